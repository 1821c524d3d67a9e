// Rotary embedding of q and k, and the write of k and v to the paged cache. The kernel is in rope_kv_write.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/fast_divide.h"
#include "arch/kv_scale.h"

namespace fastattn {

constexpr int32_t kMaxHeadDim8Bit = 256;  // with caches of 8 bits

// Strides count elements; the last dimension is contiguous.
struct RopeKvWriteParams {
  void* q = nullptr;                      // (T, H, D), changed in place
  const void* k = nullptr;                // (T, Hk, D)
  const void* v = nullptr;                // (T, Hk, D)
  const float* cos_sin = nullptr;         // (max_position, rotary_dim): cosines, then sines
  const int32_t* positions = nullptr;     // (T)
  const int32_t* slot_mapping = nullptr;  // (T), block * block_size + offset; -1 writes nothing
  void* k_cache = nullptr;                // (num_blocks, block_size, Hk, D)
  void* v_cache = nullptr;
  const void* q_norm_weight = nullptr;  // (D) or nullptr
  const void* k_norm_weight = nullptr;
  KvScale k_scale, v_scale;  // of caches of 8 bits; those of tokens are written too
  bool scales_of_tokens = false;

  int64_t q_token_stride = 0, q_head_stride = 0;
  int64_t k_token_stride = 0, k_head_stride = 0;
  int64_t v_token_stride = 0, v_head_stride = 0;
  int64_t k_block_stride = 0, k_slot_stride = 0, k_cache_head_stride = 0;
  int64_t v_block_stride = 0, v_slot_stride = 0, v_cache_head_stride = 0;
  int64_t cos_sin_stride = 0;

  int64_t num_tokens = 0;
  int32_t num_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0;
  int64_t max_position = 0;
  int32_t num_blocks = 0;
  int32_t block_size = 1;
  float norm_eps = 0.0f;
  bool interleaved = false;
  bool hadamard = false;  // of q and k after the rotation, with caches of 8 bits
  DType dtype = DType::kBFloat16;
  DType cache_dtype = DType::kBFloat16;  // dtype, kFloat8E4M3 or kInt8

  FastDivide block_size_div;  // set by rope_kv_write
};

// Needs T > 0 and D > 0. A slot outside the cache writes nothing; a position outside cos_sin gives NaN, never a read
// out of bounds. cudaErrorInvalidValue for a dtype that is not bf16 or fp16.
cudaError_t rope_kv_write(const RopeKvWriteParams& params, cudaStream_t stream);

}  // namespace fastattn
