// LayerNorm (https://arxiv.org/abs/1607.06450) with the biased variance.
//
//   out[r, :] = round((x[r, :] - mean) * rsqrt(var + eps) * weight + bias)
//
//   x, out (rows, N) bf16 or fp16   weight, bias (N)   fp32 arithmetic
//
// One CTA per row, which stays in registers (norm/row_cache.cuh), two CTA sums: the mean first, then the squares of the
// differences from it, which does not cancel where the mean is large. Memory bounds it.
//
//   load ──> sum ──> ask for weight, bias ──> CTA sum ──> squares of (x - mean) ──> CTA sum ──> scale, shift, store
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
    layer_norm_kernel(float inverse_size, typename Cache::Index num_vecs, const __grid_constant__ LayerNormParams p) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  const int32_t row_idx = blockIdx.x;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  T* const out = static_cast<T*>(p.out) + row_idx * p.row_size;
  const auto load_from = [](const void* values) {
    return [values](Index vec_idx) { return load_pack_early<VEC>(static_cast<const T*>(values) + vec_idx * VEC); };
  };
  grid_dependency_launch();
  grid_dependency_wait();

  Cache row, gain, shift;
  row.fill(num_vecs, load_from(x));

  float sum = 0.0f;
  row.visit(num_vecs, load_from(x), [&](int, Index, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum += values[i];
  });
  if (p.weight != nullptr) gain.fill(num_vecs, load_from(p.weight));
  if (p.bias != nullptr) shift.fill(num_vecs, load_from(p.bias));
  const float mean = block_sum<0>(sum) * inverse_size;

  float square_sum = 0.0f;
  row.visit(num_vecs, load_from(x), [&](int, Index, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) square_sum += (values[i] - mean) * (values[i] - mean);
  });
  const float scale = rsqrtf(block_sum<1>(square_sum) * inverse_size + p.eps);

  row.visit(num_vecs, load_from(x), [&](int slot, Index vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC], factors[VEC];
    unpack(vec, values);
#pragma unroll
    for (float& value : values) value = (value - mean) * scale;
    if (p.weight != nullptr) {
      unpack(gain.at(slot, vec_idx, load_from(p.weight)), factors);
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[i] *= factors[i];
    }
    if (p.bias != nullptr) {
      unpack(shift.at(slot, vec_idx, load_from(p.bias)), factors);
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[i] += factors[i];
    }
    store_vec<VEC>(out + vec_idx * VEC, values);
  });
}

}  // namespace

cudaError_t layer_norm(const LayerNormParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out) &&
                       aligned_rows(p.weight) && aligned_rows(p.bias);
  return dispatch_half(p.dtype, [&](auto element) {
    return with_row_cache<decltype(element)>(p.row_size, vectors, [&](auto cache, int num_threads) {
      using Cache = decltype(cache);
      const float inverse_size = 1.0f / static_cast<float>(p.row_size);
      const typename Cache::Index num_vecs = p.row_size / Cache::VEC;
      return launch_kernel_behind(layer_norm_kernel<Cache>, p.num_rows, num_threads, 0, stream, inverse_size, num_vecs,
                                  p);
    });
  });
}

}  // namespace fastattn
