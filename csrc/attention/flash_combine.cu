#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "arch/e4m3.cuh"
#include "arch/fragments.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "attention/flash_combine.h"

namespace fastattn {
namespace {

// One warp per (token, head). Splits are read in order by every lane, so the result does not depend
// on timing. A split without keys has LSE -inf and an unwritten O, which is therefore not read.
template <typename T>
__global__ void __launch_bounds__(128) flash_combine_kernel(const float* partial_out,  // (splits, T, H, D)
                                                            const float* partial_lse,  // (splits, T / n, H, n)
                                                            T* out,                    // (T, H, D)
                                                            const float* out_scale,    // (1), of e4m3
                                                            float* lse,                // (T / n, H, n)
                                                            int32_t num_splits, int64_t num_tokens, int64_t lse_tokens,
                                                            int32_t num_heads, int32_t head_dim) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= num_tokens * num_heads) return;
  const int64_t token_idx = row / num_heads;
  const int32_t head_idx = static_cast<int32_t>(row - token_idx * num_heads);
  const int64_t batch_idx = token_idx / lse_tokens;
  const int64_t lse_idx = (batch_idx * num_heads + head_idx) * lse_tokens + (token_idx - batch_idx * lse_tokens);
  const int64_t num_rows = num_tokens * num_heads;
  grid_dependency_wait();

  float max_lse = -INFINITY;
  for (int s = 0; s < num_splits; ++s) {
    max_lse = fmaxf(max_lse, partial_lse[s * num_rows + lse_idx]);
  }
  const float origin = max_lse == -INFINITY ? 0.0f : max_lse;
  float sum = 0.0f;
  for (int s = 0; s < num_splits; ++s) sum += __expf(partial_lse[s * num_rows + lse_idx] - origin);
  if (lane == 0) lse[lse_idx] = sum == 0.0f ? -INFINITY : origin + logf(sum);

  float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  if constexpr (sizeof(T) == 1) inverse /= *out_scale;
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
    if constexpr (sizeof(T) == 1) {
      *reinterpret_cast<uint32_t*>(out + row * head_dim + dim) = pack_e4m3(acc.x, acc.y, acc.z, acc.w);
    } else {
      *reinterpret_cast<uint2*>(out + row * head_dim + dim) =
          make_uint2(pack_pair<T>(acc.x, acc.y), pack_pair<T>(acc.z, acc.w));
    }
  }
}

template <typename T>
cudaError_t launch(const FlashCombineParams& p, cudaStream_t stream) {
  const int64_t num_ctas = (p.num_tokens * p.num_heads + 3) / 4;
  return launch_kernel_behind(flash_combine_kernel<T>, num_ctas, 128, 0, stream, p.partial_out, p.partial_lse,
                              static_cast<T*>(p.out), p.out_scale, p.lse, p.num_splits, p.num_tokens, p.lse_tokens,
                              p.num_heads, p.head_dim);
}

}  // namespace

cudaError_t flash_combine(const FlashCombineParams& params, cudaStream_t stream) {
  if (params.out_scale != nullptr) return launch<__nv_fp8_e4m3>(params, stream);
  return params.dtype == DType::kFloat16 ? launch<__half>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

}  // namespace fastattn
