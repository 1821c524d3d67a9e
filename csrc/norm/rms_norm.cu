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
//          └─────────── the row and the weight stay in registers (norm/row_cache.cuh) ──────┘
//
// All loads are asked for before the first is used: one latency of memory, not three.
//
// Rows that are not 16-byte aligned, or not a multiple of 8 long, take VEC = 1.
#include "arch/dispatch.h"
#include "arch/reduce.cuh"
#include "norm/rms_norm.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

template <typename T, int VEC, bool ADD>
__global__ void __launch_bounds__(1024) rms_norm_kernel(const __grid_constant__ RmsNormParams p) {
  const int64_t row_idx = blockIdx.x;
  const int64_t num_vecs = p.row_size / VEC;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  T* const residual = ADD ? static_cast<T*>(p.residual) + p.residual_rows.offset(row_idx) : nullptr;
  const T* const weight = static_cast<const T*>(p.weight);
  T* const out = static_cast<T*>(p.out) + row_idx * p.row_size;

  const auto load_from = [](const T* row) {
    return [row](int64_t vec_idx) { return load_pack<VEC>(row + vec_idx * VEC); };
  };
  RowCache<T, VEC> row, old, weights;
  row.fill(num_vecs, load_from(x));
  if constexpr (ADD) old.fill(num_vecs, load_from(residual));
  if (weight != nullptr) weights.fill(num_vecs, load_from(weight));

  float square_sum = 0.0f;
  row.visit(num_vecs, load_from(x), [&](int slot, int64_t vec_idx, Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
    if constexpr (ADD) {
      float before[VEC];
      unpack(old.at(slot, vec_idx, load_from(residual)), before);
#pragma unroll
      // Rounded here, so that the norm reads what later layers will read.
      for (int i = 0; i < VEC; ++i) vec.values[i] = round_to<T>(values[i] + before[i]);
      *reinterpret_cast<Pack<T, VEC>*>(residual + vec_idx * VEC) = vec;
      unpack(vec, values);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) square_sum += values[i] * values[i];
  });
  const float scale = rsqrtf(block_sum(square_sum) / static_cast<float>(p.row_size) + p.eps);

  row.visit(num_vecs, load_from(ADD ? residual : x), [&](int slot, int64_t vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC], scaled[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) scaled[i] = 1.0f;
    if (weight != nullptr) unpack(weights.at(slot, vec_idx, load_from(weight)), scaled);
#pragma unroll
    for (int i = 0; i < VEC; ++i) scaled[i] *= values[i] * scale;
    store_vec<VEC>(out + vec_idx * VEC, scaled);
  });
}

template <typename T, int VEC>
cudaError_t launch(const RmsNormParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const unsigned num_threads = row_cache_threads(p.row_size / VEC, RowCache<T, VEC>::kCached);
  const auto kernel = p.residual != nullptr ? rms_norm_kernel<T, VEC, true> : rms_norm_kernel<T, VEC, false>;
  kernel<<<static_cast<unsigned>(p.num_rows), num_threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out) &&
                       aligned_rows(p.weight) && aligned_rows(p.residual, p.residual_rows);
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    return vectors ? launch<T, 8>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace fastattn
