// One kernel at a time.
#pragma once

namespace fastattn {

inline void grid_dependency_launch() {}
inline void grid_dependency_wait() {}

}  // namespace fastattn
