// One way to refuse a bad argument: a std::invalid_argument (ValueError in Python) that names it, raised before any
// change.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastattn {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// A broken invariant is our bug, not the caller's: RuntimeError in Python.
template <typename... Parts>
void invariant(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error("invariant broken: " + message.str());
}

}  // namespace fastattn
