// Checks of an operator's tensors for those who call torch.ops directly; fastattn.ops has checked more, and with the
// right Python exception, before. Messages are of one kind: "rms_norm: weight has shape (5), expected (8)".
#pragma once

#include <initializer_list>
#include <string>

#include "arch/kv_scale.h"
#include "torch/common.h"

namespace fastattn {

constexpr int64_t kAny = -1;

class Checks {
 public:
  // Everything must be on the device of `first`.
  Checks(const char* op, const char* first_name, const Tensor& first);

  // Shape, with kAny for a free size, and a contiguous last dimension.
  const Checks& shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) const;
  // One to three dimensions, the last one contiguous.
  const Checks& rows(const char* name, const Tensor& t) const;
  const Checks& dtype(const char* name, const Tensor& t, std::initializer_list<ScalarType> allowed) const;
  // Of a K and a V cache (num_blocks, block_size, Hk, D) for q: its dtype, or 8 bits, then with their scales.
  const Checks& caches(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const MaybeTensor& k_scale,
                       const MaybeTensor& v_scale) const;
  const Checks& that(bool holds, const std::string& message) const;

 private:
  void device_and_last_stride(const char* name, const Tensor& t) const;

  const char* op_;
  int32_t device_index_;
};

KvScale kv_scale_of(const MaybeTensor& scale);

inline constexpr std::initializer_list<ScalarType> kHalves = {ScalarType::BFloat16, ScalarType::Half};
inline constexpr std::initializer_list<ScalarType> kAttentionInputs = {ScalarType::BFloat16, ScalarType::Half,
                                                                       ScalarType::Float8_e4m3fn};
inline constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Float, ScalarType::BFloat16,
                                                              ScalarType::Half};

}  // namespace fastattn
