// The L2 cache's policies: there is no cache here.
#pragma once

#include <cstdint>

namespace fastattn {

inline uint64_t evict_first_policy() { return 0; }
inline uint64_t evict_normal_policy() { return 0; }

}  // namespace fastattn
