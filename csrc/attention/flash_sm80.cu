// Dispatch table of flash_sm80, and the combination of split results.
//
//   out[t, h, :] = sum_s w_s partial_out[s, t, h, :] / sum_s w_s,   w_s = exp(lse_s - max_s lse_s)
//   lse[h, t]    = max_s lse_s + log sum_s w_s
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arch/mma_sm80.cuh"
#include "attention/flash_sm80.h"
#include "attention/flash_sm80_launch.h"

namespace fastattn {
namespace {

// One warp per (token, head). Splits are read in order by every lane, so the result does not depend
// on timing. A split without keys has LSE -inf and an unwritten O, which is therefore not read.
template <typename T>
__global__ void __launch_bounds__(128)
    flash_sm80_combine_kernel(const float* __restrict__ partial_out,  // (splits, T, H, D)
                              const float* __restrict__ partial_lse,  // (splits, H, T)
                              T* __restrict__ out,                    // (T, H, D)
                              float* __restrict__ lse,                // (H, T)
                              int32_t num_splits, int64_t num_tokens, int32_t num_heads, int32_t head_dim) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= num_tokens * num_heads) return;
  const int64_t token_idx = row / num_heads;
  const int64_t lse_idx = (row - token_idx * num_heads) * num_tokens + token_idx;
  const int64_t num_rows = num_tokens * num_heads;

  float max_lse = -INFINITY;
  for (int s = 0; s < num_splits; ++s) {
    max_lse = fmaxf(max_lse, partial_lse[s * num_rows + lse_idx]);
  }
  const float origin = max_lse == -INFINITY ? 0.0f : max_lse;
  float sum = 0.0f;
  for (int s = 0; s < num_splits; ++s) sum += __expf(partial_lse[s * num_rows + lse_idx] - origin);
  if (lane == 0) lse[lse_idx] = sum == 0.0f ? -INFINITY : origin + logf(sum);

  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int dim = lane * 4; dim < head_dim; dim += 128) {
    float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < num_splits; ++s) {
      const float split_lse = partial_lse[s * num_rows + lse_idx];
      if (split_lse == -INFINITY) continue;
      const float weight = __expf(split_lse - origin) * inverse;
      const float4 part = *reinterpret_cast<const float4*>(partial_out + (s * num_rows + row) * head_dim + dim);
      acc.x += weight * part.x;
      acc.y += weight * part.y;
      acc.z += weight * part.z;
      acc.w += weight * part.w;
    }
    *reinterpret_cast<uint2*>(out + row * head_dim + dim) =
        make_uint2(pack_pair<T>(acc.x, acc.y), pack_pair<T>(acc.z, acc.w));
  }
}

template <typename T>
cudaError_t launch_combine(const FlashSm80Params& p, cudaStream_t stream) {
  const int64_t num_ctas = (p.num_tokens * p.num_heads + 3) / 4;
  flash_sm80_combine_kernel<T>
      <<<static_cast<unsigned>(num_ctas), 128, 0, stream>>>(p.partial_out, p.partial_lse, static_cast<T*>(p.out), p.lse,
                                                            p.config.num_splits, p.num_tokens, p.num_heads, p.head_dim);
  return cudaGetLastError();
}

using Launch = cudaError_t (*)(const FlashSm80Params&, cudaStream_t);

struct Instantiation {
  DType dtype;
  int head_dim;
  bool paged;
  bool decode;
  Launch launch;
};

// Which exist: add a line here and its instantiation in flash_sm80_hd*.cu.
constexpr DType kBf16 = DType::kBFloat16;
constexpr DType kFp16 = DType::kFloat16;
constexpr Instantiation kInstantiations[] = {
    // dtype, head dim, paged, decode
    {kBf16, 64, false, false, launch_flash_sm80<__nv_bfloat16, 64, false, ContiguousKv<__nv_bfloat16>>},
    {kBf16, 64, false, true, launch_flash_sm80<__nv_bfloat16, 64, true, ContiguousKv<__nv_bfloat16>>},
    {kBf16, 64, true, false, launch_flash_sm80<__nv_bfloat16, 64, false, PagedKv<__nv_bfloat16>>},
    {kBf16, 64, true, true, launch_flash_sm80<__nv_bfloat16, 64, true, PagedKv<__nv_bfloat16>>},
    {kBf16, 128, false, false, launch_flash_sm80<__nv_bfloat16, 128, false, ContiguousKv<__nv_bfloat16>>},
    {kBf16, 128, false, true, launch_flash_sm80<__nv_bfloat16, 128, true, ContiguousKv<__nv_bfloat16>>},
    {kBf16, 128, true, false, launch_flash_sm80<__nv_bfloat16, 128, false, PagedKv<__nv_bfloat16>>},
    {kBf16, 128, true, true, launch_flash_sm80<__nv_bfloat16, 128, true, PagedKv<__nv_bfloat16>>},
    {kBf16, 256, false, false, launch_flash_sm80<__nv_bfloat16, 256, false, ContiguousKv<__nv_bfloat16>>},
    {kBf16, 256, false, true, launch_flash_sm80<__nv_bfloat16, 256, true, ContiguousKv<__nv_bfloat16>>},
    {kBf16, 256, true, false, launch_flash_sm80<__nv_bfloat16, 256, false, PagedKv<__nv_bfloat16>>},
    {kBf16, 256, true, true, launch_flash_sm80<__nv_bfloat16, 256, true, PagedKv<__nv_bfloat16>>},
    {kFp16, 64, false, false, launch_flash_sm80<__half, 64, false, ContiguousKv<__half>>},
    {kFp16, 64, false, true, launch_flash_sm80<__half, 64, true, ContiguousKv<__half>>},
    {kFp16, 64, true, false, launch_flash_sm80<__half, 64, false, PagedKv<__half>>},
    {kFp16, 64, true, true, launch_flash_sm80<__half, 64, true, PagedKv<__half>>},
    {kFp16, 128, false, false, launch_flash_sm80<__half, 128, false, ContiguousKv<__half>>},
    {kFp16, 128, false, true, launch_flash_sm80<__half, 128, true, ContiguousKv<__half>>},
    {kFp16, 128, true, false, launch_flash_sm80<__half, 128, false, PagedKv<__half>>},
    {kFp16, 128, true, true, launch_flash_sm80<__half, 128, true, PagedKv<__half>>},
    {kFp16, 256, false, false, launch_flash_sm80<__half, 256, false, ContiguousKv<__half>>},
    {kFp16, 256, false, true, launch_flash_sm80<__half, 256, true, ContiguousKv<__half>>},
    {kFp16, 256, true, false, launch_flash_sm80<__half, 256, false, PagedKv<__half>>},
    {kFp16, 256, true, true, launch_flash_sm80<__half, 256, true, PagedKv<__half>>},
};

}  // namespace

const char* flash_sm80_supported() { return "bfloat16 and float16, head_dim up to 256"; }

cudaError_t flash_sm80_forward(const FlashSm80Params& params, cudaStream_t stream) {
  FlashSm80Params p = params;
  p.group_size = FastDivide(p.num_heads / p.num_kv_heads);
  p.block_size_div = FastDivide(p.block_size);
  for (const Instantiation& entry : kInstantiations) {
    if (entry.dtype != p.dtype || entry.head_dim != p.config.head_dim || entry.paged != p.paged ||
        entry.decode != p.config.decode) {
      continue;
    }
    const cudaError_t error = entry.launch(p, stream);
    if (error != cudaSuccess || p.config.num_splits == 1) return error;
    return p.dtype == kBf16 ? launch_combine<__nv_bfloat16>(p, stream) : launch_combine<__half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
