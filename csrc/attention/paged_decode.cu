// Dispatch table of paged_decode.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cstdint>

#include "arch/launch_id.h"
#include "attention/paged_decode.h"
#include "attention/paged_decode_launch.h"

namespace fastattn {
namespace {

using Launch = cudaError_t (*)(const PagedDecodeParams&, cudaStream_t);

struct Instantiation {
  DType dtype, kv_dtype;
  int head_dim;
  Launch launch, launch_tree, launch_beside;
};

template <typename T, typename KV, int HEAD_DIM>
constexpr Instantiation instantiation(DType dtype, DType kv_dtype) {
  return {dtype,
          kv_dtype,
          HEAD_DIM,
          launch_paged_decode<T, KV, HEAD_DIM, AttentionMask>,
          launch_paged_decode<T, KV, HEAD_DIM, TreeMask>,
          launch_paged_decode<T, KV, HEAD_DIM, AttentionMask, true>};
}

// Which exist: add a line here and its three instantiations in paged_decode_hd*.cu or paged_decode_8bit_hd*.cu.
constexpr Instantiation kInstantiations[] = {
    instantiation<__nv_bfloat16, __nv_bfloat16, 64>(DType::kBFloat16, DType::kBFloat16),
    instantiation<__nv_bfloat16, __nv_bfloat16, 96>(DType::kBFloat16, DType::kBFloat16),
    instantiation<__nv_bfloat16, __nv_bfloat16, 128>(DType::kBFloat16, DType::kBFloat16),
    instantiation<__nv_bfloat16, __nv_bfloat16, 192>(DType::kBFloat16, DType::kBFloat16),
    instantiation<__nv_bfloat16, __nv_bfloat16, 256>(DType::kBFloat16, DType::kBFloat16),
    instantiation<__half, __half, 64>(DType::kFloat16, DType::kFloat16),
    instantiation<__half, __half, 96>(DType::kFloat16, DType::kFloat16),
    instantiation<__half, __half, 128>(DType::kFloat16, DType::kFloat16),
    instantiation<__half, __half, 192>(DType::kFloat16, DType::kFloat16),
    instantiation<__half, __half, 256>(DType::kFloat16, DType::kFloat16),
    instantiation<uint16_t, __nv_fp8_e4m3, 64>(DType::kBFloat16, DType::kFloat8E4M3),
    instantiation<uint16_t, __nv_fp8_e4m3, 128>(DType::kBFloat16, DType::kFloat8E4M3),
    instantiation<uint16_t, __nv_fp8_e4m3, 256>(DType::kBFloat16, DType::kFloat8E4M3),
    instantiation<uint16_t, int8_t, 64>(DType::kBFloat16, DType::kInt8),
    instantiation<uint16_t, int8_t, 128>(DType::kBFloat16, DType::kInt8),
    instantiation<uint16_t, int8_t, 256>(DType::kBFloat16, DType::kInt8),
    instantiation<uint16_t, __nv_fp8_e4m3, 64>(DType::kFloat16, DType::kFloat8E4M3),
    instantiation<uint16_t, __nv_fp8_e4m3, 128>(DType::kFloat16, DType::kFloat8E4M3),
    instantiation<uint16_t, __nv_fp8_e4m3, 256>(DType::kFloat16, DType::kFloat8E4M3),
    instantiation<uint16_t, int8_t, 64>(DType::kFloat16, DType::kInt8),
    instantiation<uint16_t, int8_t, 128>(DType::kFloat16, DType::kInt8),
    instantiation<uint16_t, int8_t, 256>(DType::kFloat16, DType::kInt8),
};

}  // namespace

cudaError_t paged_decode(const PagedDecodeParams& params, cudaStream_t stream) {
  PagedDecodeParams p = params;
  p.set_divisions();
  p.num_parts_div = FastDivide(static_cast<int32_t>(p.config.num_parts));
  p.num_columns_div = FastDivide(static_cast<int32_t>(p.config.num_columns));
  p.num_kv_heads_div = FastDivide(p.num_kv_heads);
  p.launch_id = new_launch_id();
  p.even_rows = (!p.paged || p.block_size % kPagedDecodeEvenRows == 0) &&
                std::max(p.k_token_stride, p.v_token_stride) * 2 <= UINT32_MAX;  // distances are counted in 32 bits
  if (!p.paged) {                                                                // a batch's sequences are its pages
    p.k_block_stride = p.k_batch_stride;
    p.v_block_stride = p.v_batch_stride;
  }

  for (const Instantiation& entry : kInstantiations) {
    if (p.config.fits && entry.dtype == p.dtype && entry.kv_dtype == p.kv_dtype &&
        entry.head_dim == p.config.head_dim) {
      const Launch plain = p.config.beside_prompts ? entry.launch_beside : entry.launch;
      return (p.tree_mask == nullptr ? plain : entry.launch_tree)(p, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
