// Memory for what the Hopper kernels hand on from one CTA to another.
#pragma once

#include "torch/gemm_call.h"

namespace fastattn {

// The workspaces that p.config asks for, on the device of `like`; they live as long as what is given back.
template <typename Params>
std::optional<Tensor> workspaces_of(Params& p, const Tensor& like) {
  const int64_t num_sums = p.config.num_sums(), num_marks = p.config.num_marks();
  if (num_sums == 0) return std::nullopt;
  Tensor workspace = empty(like, {num_sums + 2 * num_marks}, ScalarType::Float);
  p.sums = static_cast<float*>(workspace.data_ptr());
  p.marks = reinterpret_cast<uint64_t*>(p.sums + num_sums);
  return workspace;
}

}  // namespace fastattn
