// The exponential of the special function units.
#pragma once

#include "device.h"

namespace fastattn {

inline float exp2_approx(float x) { return std::exp2(x); }

}  // namespace fastattn
