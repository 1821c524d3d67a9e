// RMSNorm (https://arxiv.org/abs/1910.07467), with or without the addition to the residual stream before it.
//
//   residual[r, :] = round(x[r, :] + residual[r, :])                                 with a residual only
//   out[r, :]      = round(h[r, :] * rsqrt(mean(h[r, :]^2) + eps) * weight)          h = residual, or x
//
//   x, residual, out (rows, N) bf16 or fp16   weight (N)   fp32 arithmetic
//
// One CTA per row. Memory bounds it: each element is read once and written once.
//
//   load 16 bytes a thread ──> add, round, store residual ──> sum of squares ──> CTA sum ──> scale, store
//          └────────────── the row stays in registers (norm/row_cache.cuh) ──────────────┘
//
// All loads of the row are asked for before the first is used: one latency of memory, not two.
//
// Rows that are not 16-byte aligned, or not a multiple of 8 long, take VEC = 1.
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "norm/rms_norm.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

template <typename Cache, bool ADD>
__global__ void __launch_bounds__(1024, 1)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p, float inverse_size) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  const int32_t row_idx = blockIdx.x;
  const Index num_vecs = static_cast<Index>(p.row_size) / VEC;
  const T* const weight = static_cast<const T*>(p.weight);
  const auto load_from = [](const T* row) {
    return [row](Index vec_idx) { return load_pack_early<VEC>(row + vec_idx * VEC); };
  };
  grid_dependency_wait();
  grid_dependency_launch();

  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  T* const residual = ADD ? static_cast<T*>(p.residual) + p.residual_rows.offset(row_idx) : nullptr;
  T* const out = static_cast<T*>(p.out) + row_idx * p.row_size;
  Cache row, old, gain;
  row.fill(num_vecs, load_from(x));
  if constexpr (ADD) old.fill(num_vecs, load_from(residual));
  if constexpr (!Cache::kLong) {
    if (weight != nullptr) gain.fill(num_vecs, load_from(weight));
  }

  float square_sum = 0.0f;
  row.visit(num_vecs, load_from(x), [&](int slot, Index vec_idx, Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
    if constexpr (ADD) {
      float before[VEC];
      unpack(old.at(slot, vec_idx, load_from(residual)), before);
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[i] += before[i];
      vec = packed<T>(values);
      store_pack<VEC>(residual + vec_idx * VEC, vec);
      unpack(vec, values);  // rounded, so that the norm reads what later layers will read
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) square_sum += values[i] * values[i];
  });
  const float scale = rsqrtf(block_sum(square_sum) * inverse_size + p.eps);

  row.visit(num_vecs, load_from(ADD ? residual : x), [&](int slot, Index vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC], scaled[VEC];
    unpack(vec, values);
#pragma unroll
    for (float& factor : scaled) factor = 1.0f;
    if constexpr (Cache::kLong) {
      if (weight != nullptr) load_vec<VEC>(weight + vec_idx * VEC, scaled);
    } else {
      if (weight != nullptr) unpack(gain.cached[slot], scaled);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) scaled[i] *= values[i] * scale;
    store_vec<VEC>(out + vec_idx * VEC, scaled);
  });
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out) &&
                       aligned_rows(p.weight) && aligned_rows(p.residual, p.residual_rows);
  return dispatch_half(p.dtype, [&](auto element) {
    return with_row_cache<decltype(element)>(p.row_size, vectors, [&](auto cache, int num_threads) {
      using Cache = decltype(cache);
      const auto kernel = p.residual != nullptr ? rms_norm_kernel<Cache, true> : rms_norm_kernel<Cache, false>;
      const float inverse_size = 1.0f / static_cast<float>(p.row_size);
      return launch_kernel_behind(kernel, p.num_rows, num_threads, 0, stream, p, inverse_size);
    });
  });
}

}  // namespace fastattn
