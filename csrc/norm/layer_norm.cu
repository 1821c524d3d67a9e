// LayerNorm (https://arxiv.org/abs/1607.06450) with the biased variance.
//
//   out[r, :] = round((x[r, :] - mean) * rsqrt(var + eps) * weight + bias)
//
//   x, out (rows, N) bf16 or fp16   weight, bias (N)   fp32 arithmetic
//
// One CTA per row, which stays in registers (norm/row_cache.cuh), two CTA sums: the mean first, then the squares of the
// differences from it, which does not cancel where the mean is large. Memory bounds it.
//
//   load ──> sum ──> CTA sum ──> squares of (x - mean) ──> CTA sum ──> scale, shift, store
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "norm/layer_norm.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

template <typename Cache>
__global__ void __launch_bounds__(1024, 1)
    layer_norm_kernel(const __grid_constant__ LayerNormParams p, float inverse_size) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  const int32_t row_idx = blockIdx.x;
  const Index num_vecs = static_cast<Index>(p.row_size) / VEC;
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  grid_dependency_wait();
  grid_dependency_launch();

  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  T* const out = static_cast<T*>(p.out) + row_idx * p.row_size;
  const auto load_from = [](const T* row) {
    return [row](Index vec_idx) { return load_pack_early<VEC>(row + vec_idx * VEC); };
  };
  const auto load = load_from(x);
  Cache row, gain;
  row.fill(num_vecs, load);
  if constexpr (!Cache::kLong) {
    if (weight != nullptr) gain.fill(num_vecs, load_from(weight));
  }

  float sum = 0.0f;
  row.visit(num_vecs, load, [&](int, Index, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += values[i];
  });
  const float mean = block_sum(sum) * inverse_size;

  float square_sum = 0.0f;
  row.visit(num_vecs, load, [&](int, Index, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) square_sum += (values[i] - mean) * (values[i] - mean);
  });
  const float scale = rsqrtf(block_sum(square_sum) * inverse_size + p.eps);

  row.visit(num_vecs, load, [&](int slot, Index vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC], scaled[VEC];
    float shift[VEC] = {};
    unpack(vec, values);
#pragma unroll
    for (float& factor : scaled) factor = 1.0f;
    if constexpr (Cache::kLong) {
      if (weight != nullptr) load_vec<VEC>(weight + vec_idx * VEC, scaled);
    } else {
      if (weight != nullptr) unpack(gain.cached[slot], scaled);
    }
    if (bias != nullptr) load_vec<VEC>(bias + vec_idx * VEC, shift);
#pragma unroll
    for (int i = 0; i < VEC; ++i) scaled[i] = (values[i] - mean) * scale * scaled[i] + shift[i];
    store_vec<VEC>(out + vec_idx * VEC, scaled);
  });
}

}  // namespace

cudaError_t layer_norm(const LayerNormParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out) &&
                       aligned_rows(p.weight) && aligned_rows(p.bias);
  return dispatch_half(p.dtype, [&](auto element) {
    return with_row_cache<decltype(element)>(p.row_size, vectors, [&](auto cache, int num_threads) {
      const float inverse_size = 1.0f / static_cast<float>(p.row_size);
      return launch_kernel_behind(layer_norm_kernel<decltype(cache)>, p.num_rows, num_threads, 0, stream, p,
                                  inverse_size);
    });
  });
}

}  // namespace fastattn
