#include "torch/checks.h"

#include <algorithm>
#include <stdexcept>

namespace fastattn {
namespace {

template <typename Sizes>
std::string text(const Sizes& sizes) {
  std::string out;
  for (int64_t size : sizes)
    out += (out.empty() ? "(" : ", ") + (size == kAny ? std::string("any") : std::to_string(size));
  return (out.empty() ? "(" : out) + ")";
}

const char* text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

}  // namespace

Checks::Checks(const char* op, const char* first_name, const Tensor& first)
    : op_(op), device_index_(first.get_device_index()) {
  that(first.is_cuda(), std::string(first_name) + " is not on a CUDA device");
}

const Checks& Checks::that(bool holds, const std::string& message) const {
  if (!holds) throw std::runtime_error(std::string(op_) + ": " + message);
  return *this;
}

const Checks& Checks::shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) const {
  const std::vector<int64_t> actual = shape_of(t);
  bool fits = actual.size() == expected.size();
  for (size_t i = 0; fits && i < actual.size(); ++i) {
    const int64_t size = expected.begin()[i];
    fits = size == kAny || size == actual[i];
  }
  if (!fits) that(false, std::string(name) + " has shape " + text(actual) + ", expected " + text(expected));
  device_and_last_stride(name, t);
  return *this;
}

const Checks& Checks::rows(const char* name, const Tensor& t) const {
  if (t.dim() < 1 || t.dim() > 3) {
    that(false, std::string(name) + " has " + std::to_string(t.dim()) + " dimensions, expected 1 to 3");
  }
  device_and_last_stride(name, t);
  return *this;
}

const Checks& Checks::dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) const {
  if (std::find(allowed.begin(), allowed.end(), t.scalar_type()) == allowed.end()) {
    std::string names;
    for (ScalarType dtype : allowed) names += (names.empty() ? "" : " or ") + std::string(text(dtype));
    that(false, std::string(name) + " is " + text(t.scalar_type()) + ", expected " + names);
  }
  return *this;
}

void Checks::device_and_last_stride(const char* name, const Tensor& t) const {
  if (!t.is_cuda() || t.get_device_index() != device_index_) {
    that(false, std::string(name) + " is not on CUDA device " + std::to_string(device_index_));
  }
  const int64_t last = t.dim() - 1;
  if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1) {
    that(false, std::string(name) + " has stride " + std::to_string(t.stride(last)) +
                    " in its last dimension, expected it contiguous (stride 1)");
  }
}

}  // namespace fastattn
