// A gated activation on a tensor, for the operators that end with one.
#pragma once

#include <string>

#include "elementwise/gated_activation.h"
#include "torch/checks.h"

namespace fastattn {

Activation activation_named(const Checks& checks, const std::string& name);

// out (…, N), contiguous, of x (…, 2N); neither is empty.
void run_gated_activation(const char* op, const Tensor& x, Activation activation, bool interleaved, Tensor& out);

}  // namespace fastattn
