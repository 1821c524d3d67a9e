// What a norm multiplies rows by and takes off them, for products of many rows:
//
//   row_norms[m] = {scale, mean}     out[m, n] = (sum_k x[m, k] weight[n, k] - mean * weight_sum[n]) * scale
//
//   RMSNorm     scale = rsqrt(mean(x[m, :]^2) + eps), mean 0; squares may be given, of 32 columns each
//   LayerNorm   mean(x[m, :]), scale = rsqrt(var(x[m, :]) + eps)
//   x (M, K) bf16 or fp16, K a multiple of 8, rows 16-byte aligned   row_norms (M) fp32
//
// A warp has a row, 8 vectors of a lane on their way at a time and the next row as far as L2. Where a CTA of the
// product leaves room an SM has one CTA of four warps, and the product, which asks for the results when its first tile
// is nearly multiplied (gemm_sm90.cuh), runs beside it:
//
//   in front  ───────┐
//   this kernel      └── wait ── let the product begin ── row ── row ── row ──┐
//   the product               └── k=0 │ 1 │ 2 │ …                    … │ K-3 ─┴─ wait │ K-2 │ K-1 │ write
//
// Elsewhere it has as many as it can, which are the sooner done.
//
// The product looks at x before it has waited for this kernel: what wrote x had ended when this one let it begin.
#include <algorithm>

#include "arch/cache_policy.cuh"
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "arch/tma.cuh"
#include "gemm/gemm_row_norms_sm90.h"
#include "gemm/gemm_sm90_norm.cuh"

namespace fastattn {
namespace {

constexpr int kWarps = 4, kCtasPerSm = kGemmSm90NormCtasPerSm;  // 64 registers a thread
constexpr int kAtOnce = 8;                                      // vectors of a lane

template <typename T, GemmSm90Norm NORM>
__device__ __forceinline__ GemmSm90RowNorm norm_of(const GemmSm90Params& p, int64_t row, int lane) {
  constexpr bool kCentred = NORM == GemmSm90Norm::kLayer;
  const uint4* const vectors = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + row * p.x_stride);
  const int32_t num_vectors = static_cast<int32_t>(p.k) / 8;
  const float first = kCentred ? first_of_row<T>(p, row) : 0.0f;
  GemmSm90Moments moments;
  for (int32_t begin = lane; begin < num_vectors; begin += 32 * kAtOnce) {
    uint4 words[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + 32 * i < num_vectors) words[i] = load_early(vectors + begin + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + 32 * i >= num_vectors) break;
      moments.add_pair<T, kCentred>(words[i].x, first);
      moments.add_pair<T, kCentred>(words[i].y, first);
      moments.add_pair<T, kCentred>(words[i].z, first);
      moments.add_pair<T, kCentred>(words[i].w, first);
    }
  }
  const auto sum = [](float a, float b) { return a + b; };
  if constexpr (kCentred) moments.sum = warp_reduce(moments.sum, sum);
  moments.squares = warp_reduce(moments.squares, sum);
  return row_norm_of<NORM>(p, moments, first);
}

__device__ __forceinline__ GemmSm90RowNorm norm_of_squares(const GemmSm90Params& p, int64_t row, int lane) {
  const int32_t num_parts = num_squares_parts(p.k);
  GemmSm90Moments moments;
  for (int32_t part = lane; part < num_parts; part += 32) moments.squares += p.x_squares[row * num_parts + part];
  moments.squares = warp_reduce(moments.squares, [](float a, float b) { return a + b; });
  return row_norm_of<GemmSm90Norm::kRms>(p, moments, 0.0f);
}

template <typename T, GemmSm90Norm NORM>
__global__ void __launch_bounds__(32 * kWarps, kCtasPerSm)
    gemm_row_norms_kernel(const __grid_constant__ GemmSm90Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const int warp_idx = threadIdx.x / 32, lane = threadIdx.x % 32;
  grid_dependency_wait();
  grid_dependency_launch();
  const uint64_t policy = evict_normal_policy();
  const int64_t num_warps = kWarps * gridDim.x;
  for (int64_t row = warp_idx * gridDim.x + blockIdx.x; row < p.m; row += num_warps) {
    if (lane == 0 && row + num_warps < p.m && p.x_squares == nullptr) {
      const T* const next = static_cast<const T*>(p.x) + (row + num_warps) * p.x_stride;
      tma_prefetch_bytes(next, static_cast<uint32_t>(p.k * sizeof(T)), policy);
    }
    const GemmSm90RowNorm norm = NORM == GemmSm90Norm::kRms && p.x_squares != nullptr ? norm_of_squares(p, row, lane)
                                                                                      : norm_of<T, NORM>(p, row, lane);
    if (lane == 0) p.row_norms[row] = make_float2(norm.scale, norm.mean);
  }
#endif
}

}  // namespace

cudaError_t gemm_row_norms_sm90(const GemmSm90Params& p, GemmSm90Norm norm, cudaStream_t stream) {
  return dispatch_half(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = norm == GemmSm90Norm::kLayer ? gemm_row_norms_kernel<T, GemmSm90Norm::kLayer>
                                                     : gemm_row_norms_kernel<T, GemmSm90Norm::kRms>;
    // An SM that is to run both at a time cannot split its memory anew in between.
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    return launch_kernel_behind(kernel, p.config.norm_ctas, 32 * kWarps, 0, stream, p);
  });
}

}  // namespace fastattn
