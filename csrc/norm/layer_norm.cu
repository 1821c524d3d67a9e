// LayerNorm (https://arxiv.org/abs/1607.06450) with the biased variance.
//
//   out[r, :] = round((x[r, :] - mean) * rsqrt(var + eps) * weight + bias)
//
//   x, out (rows, N) bf16 or fp16   weight, bias (N)   fp32 arithmetic
//
// One CTA per row, the row, weight and bias in registers (norm/row_cache.cuh), two CTA sums: the mean first, then the
// squares of the differences from it, which does not cancel where the mean is large. Memory bounds it.
//
//   load ──> sum ──> CTA sum ──> squares of (x - mean) ──> CTA sum ──> scale, shift, store
#include "arch/dispatch.h"
#include "arch/reduce.cuh"
#include "norm/layer_norm.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

template <typename T, int VEC>
__global__ void __launch_bounds__(1024) layer_norm_kernel(const __grid_constant__ LayerNormParams p) {
  const int64_t row_idx = blockIdx.x;
  const int64_t num_vecs = p.row_size / VEC;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  T* const out = static_cast<T*>(p.out) + row_idx * p.row_size;
  const auto load_from = [](const T* row) {
    return [row](int64_t vec_idx) { return load_pack<VEC>(row + vec_idx * VEC); };
  };
  const auto load = load_from(x);
  RowCache<T, VEC> row, weights, shifts;
  row.fill(num_vecs, load);
  if (weight != nullptr) weights.fill(num_vecs, load_from(weight));
  if (bias != nullptr) shifts.fill(num_vecs, load_from(bias));

  float sum = 0.0f;
  row.visit(num_vecs, load, [&](int, int64_t, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += values[i];
  });
  const float mean = block_sum(sum) / static_cast<float>(p.row_size);

  float square_sum = 0.0f;
  row.visit(num_vecs, load, [&](int, int64_t, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) square_sum += (values[i] - mean) * (values[i] - mean);
  });
  const float scale = rsqrtf(block_sum(square_sum) / static_cast<float>(p.row_size) + p.eps);

  row.visit(num_vecs, load, [&](int slot, int64_t vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC], scaled[VEC];
    float shift[VEC] = {};
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) scaled[i] = 1.0f;
    if (weight != nullptr) unpack(weights.at(slot, vec_idx, load_from(weight)), scaled);
    if (bias != nullptr) unpack(shifts.at(slot, vec_idx, load_from(bias)), shift);
#pragma unroll
    for (int i = 0; i < VEC; ++i) scaled[i] = (values[i] - mean) * scale * scaled[i] + shift[i];
    store_vec<VEC>(out + vec_idx * VEC, scaled);
  });
}

template <typename T, int VEC>
cudaError_t launch(const LayerNormParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const unsigned num_threads = row_cache_threads(p.row_size / VEC, RowCache<T, VEC>::kCached);
  layer_norm_kernel<T, VEC><<<static_cast<unsigned>(p.num_rows), num_threads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t layer_norm(const LayerNormParams& p, cudaStream_t stream) {
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out) &&
                       aligned_rows(p.weight) && aligned_rows(p.bias);
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    return vectors ? launch<T, 8>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace fastattn
