#include "torch/checks.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

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

const Checks& Checks::caches(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const MaybeTensor& k_scale,
                             const MaybeTensor& v_scale) const {
  shape("k_cache", k_cache, {kAny, kAny, kAny, q.size(q.dim() - 1)});
  dtype("k_cache", k_cache, {q.scalar_type(), ScalarType::Float8_e4m3fn, ScalarType::Char});
  shape("v_cache", v_cache, {k_cache.size(0), k_cache.size(1), k_cache.size(2), k_cache.size(3)});
  dtype("v_cache", v_cache, {k_cache.scalar_type()});
  const bool of_heads = k_scale && k_scale->dim() == 1;
  for (const auto& [name, scale] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    that(scale->has_value() == k_scale.has_value(), "k_scale and v_scale are not both given, expected both or neither");
    if (!*scale) continue;
    dtype(name, **scale, {ScalarType::Float});
    std::vector<int64_t> expected = {k_cache.size(0), k_cache.size(1), k_cache.size(2)};
    if (of_heads) expected = {k_cache.size(2)};
    that((*scale)->is_cuda() && (*scale)->get_device_index() == device_index_ && shape_of(**scale) == expected,
         std::string(name) + " has shape " + text(shape_of(**scale)) +
             ", expected (Hk) or (num_blocks, block_size, Hk) " + text(expected) + " on CUDA device " +
             std::to_string(device_index_));
  }
  that(!k_scale || is_8bit(k_cache), "k_scale is given, expected it with caches of float8_e4m3fn or int8 only");
  return that(k_scale || k_cache.scalar_type() != ScalarType::Char, "k_scale is not given, expected it for int8");
}

KvScale kv_scale_of(const MaybeTensor& scale) {
  if (!scale) return {};
  float* const data = static_cast<float*>(scale->data_ptr());
  if (scale->dim() == 1) return {data, 0, 0, scale->stride(0)};
  return {data, scale->stride(0), scale->stride(1), scale->stride(2)};
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
