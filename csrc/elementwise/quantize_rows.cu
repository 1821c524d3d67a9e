// Rows in 8 bits, for products with weights in 8 bits.
//
//   scale[r] = max_j |x[r, j]| / LARGEST, or 1 for a row of zeros      q[r, j] = round(x[r, j] / scale[r]), ties to
//   even
//
//   x (rows, N) bf16 or fp16   q (rows, N) int8, LARGEST 127, or e4m3, LARGEST 448   scale (rows) fp32
//
// One CTA per row, which stays in registers (norm/row_cache.cuh). Memory bounds it: 3 bytes an element.
//
//   load 16 bytes a thread ──> largest magnitude ──> CTA maximum ──> divide, round, store 8 bytes
//
// Magnitudes are compared as their bits: as integers NaN is above infinity, and both above every number, so either
// reaches the scale, where the product finds it. Division, not multiplication by a reciprocal: the same bits as on the
// CPU. A scale below the normal numbers is coarse: only then can a quotient round beyond LARGEST, and is cut.
#include <cuda_fp8.h>

#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "elementwise/quantize_rows.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

template <typename Q>
struct Code;

template <>
struct Code<int8_t> {
  static constexpr float kLargest = 127.0f;
  // Of a NaN 0.
  __device__ static __forceinline__ int8_t of(float x) {
    return static_cast<int8_t>(max(-127, min(127, __float2int_rn(x))));
  }
};

template <>
struct Code<__nv_fp8_e4m3> {
  static constexpr float kLargest = 448.0f;
  // Of a NaN NaN.
  __device__ static __forceinline__ __nv_fp8_e4m3 of(float x) { return __nv_fp8_e4m3(x); }
};

template <typename Cache, typename Q>
__global__ void __launch_bounds__(1024, Cache::kCtasPerSm)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  grid_dependency_wait();
  grid_dependency_launch();
  const int32_t row_idx = blockIdx.x;
  const Index num_vecs = static_cast<Index>(p.row_size) / VEC;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  Q* const q = static_cast<Q*>(p.q) + row_idx * p.row_size;
  const auto load = [&](Index vec_idx) { return load_pack_early<VEC>(x + vec_idx * VEC); };

  Cache row;
  row.fill(num_vecs, load);
  uint32_t largest = 0;
  row.visit(num_vecs, load, [&](int, Index, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) largest = max(largest, __float_as_uint(fabsf(values[i])));
  });
  largest = block_reduce(largest, 0u, [](uint32_t a, uint32_t b) { return max(a, b); });
  float scale = __uint_as_float(largest) / Code<Q>::kLargest;
  if (scale == 0.0f) scale = 1.0f;
  if (threadIdx.x == 0) p.scale[row_idx] = scale;

  row.visit(num_vecs, load, [&](int, Index vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
    Pack<Q, VEC> rounded;
#pragma unroll
    for (int i = 0; i < VEC; ++i) rounded.words[i] = Code<Q>::of(values[i] / scale);
    store_pack<VEC>(q + vec_idx * VEC, rounded);
  });
}

template <typename Q>
cudaError_t launch_of(const QuantizeRowsParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.q);
  return dispatch_half(p.dtype, [&](auto element) {
    return with_row_cache<decltype(element)>(p.row_size, vectors, [&](auto cache, int num_threads) {
      return launch_kernel_behind(quantize_rows_kernel<decltype(cache), Q>, p.num_rows, num_threads, 0, stream, p);
    });
  });
}

}  // namespace

cudaError_t quantize_rows(const QuantizeRowsParams& p, cudaStream_t stream) {
  switch (p.q_dtype) {
    case DType::kInt8:
      return launch_of<int8_t>(p, stream);
    case DType::kFloat8E4M3:
      return launch_of<__nv_fp8_e4m3>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
