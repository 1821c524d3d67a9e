// Rows in 8 bits, for products with weights in 8 bits.
//
//   scale[r] = max_j |x[r, j]| / LARGEST, or 1 for a row of zeros      q[r, j] = round(x[r, j] / scale[r]), ties to
//   even
//
//   x (rows, N) bf16 or fp16   q (rows, N) int8, LARGEST 127, or e4m3, LARGEST 448   scale (rows) fp32
//
// Asymmetric, with low and high a row's least and largest element, 0 among them:
//
//   scale[r] = (high - low) / 255, or 1 for a row of zeros   zero_point[r] = round(-128 - low / scale[r])
//   q[r, j] = round(x[r, j] / scale[r] + zero_point[r])
//
// One CTA per row, which stays in registers (norm/row_cache.cuh). Memory bounds it: 3 bytes an element.
//
//   load 16 bytes a thread ──> largest magnitude ──> CTA maximum ──> divide, round, store 8 bytes
//
// Of long rows an SM has two, and reads little while it rounds them: where there are many, a CTA takes one after the
// other, and has asked for the next before it compares the one at hand.
//
// With gates x is (rows, 2N), and what gated_activation would have written takes the place of a loaded x, in the same
// bits: 5 bytes an element instead of 9, and one launch instead of two.
//
// Groups of 128 columns with a scale each: 16 lanes have one, 8 elements a lane, and nothing meets in shared memory.
//
// How an element becomes its code: eight_bits.cuh.

#include "arch/cp_async.cuh"
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "elementwise/activation.cuh"
#include "elementwise/eight_bits.cuh"
#include "elementwise/quantize_rows.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

// VEC elements that are to be quantized, those at `source` or made of them.
template <bool GATED, int VEC, typename T>
__device__ __forceinline__ Pack<T, VEC> load_elements(const QuantizeRowsParams& p, const T* source) {
  const Pack<T, VEC> elements = load_pack_early<VEC>(source);
  if constexpr (!GATED) return elements;
  if constexpr (GATED) return gated(p.activation, elements, load_pack_early<VEC>(source + p.row_size));
}

// A row that is there, or on its way.
template <typename Q, typename Cache, typename Load>
__device__ __forceinline__ void quantize_row(const QuantizeRowsParams& p, Cache& row, int32_t row_idx, Load load) {
  using Vec = typename Cache::Vec;
  using Index = typename Cache::Index;
  const Index num_vecs = static_cast<Index>(p.row_size) / Cache::VEC;
  uint32_t largest = 0;
  row.visit(num_vecs, load, [&](int, Index, const Vec& vec) { largest = largest_magnitude(largest, vec); });
  const float scale = scale_of<Q>(block_reduce(largest, 0u, [](uint32_t a, uint32_t b) { return max(a, b); }));
  if (threadIdx.x == 0) p.scale[row_idx] = scale;

  const Divider divide(scale);
  Q* const q = static_cast<Q*>(p.q) + row_idx * p.row_size;
  row.visit(num_vecs, load, [&](int, Index vec_idx, const Vec& vec) {
    store_pack<Cache::VEC>(q + vec_idx * Cache::VEC, codes_of<Q>(vec, divide));
  });
}

template <typename Cache, typename Q, bool GATED, int CTAS_PER_SM>
__global__ void __launch_bounds__(1024, CTAS_PER_SM)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t row_idx = blockIdx.x;
  const Index num_vecs = static_cast<Index>(p.row_size) / VEC;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  const auto load = [&](Index vec_idx) { return load_elements<GATED, VEC>(p, x + vec_idx * VEC); };

  Cache row;
  row.fill(num_vecs, load);
  quantize_row<Q>(p, row, row_idx, load);
}

// More rows than run at once, in turns: while a CTA compares and rounds one, its next is on its way to shared memory. A
// thread reads what it has asked for itself, so that nobody waits for another's.
template <typename Cache, typename Q, bool GATED>
__global__ void __launch_bounds__(1024, Cache::kCtasPerSm)
    quantize_rows_in_turns_kernel(const __grid_constant__ QuantizeRowsParams p) {
  using T = typename Cache::T;
  using Vec = typename Cache::Vec;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC, PARTS = GATED ? 2 : 1;
  static_assert(sizeof(Vec) == 16 && !Cache::kLong);
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t num_rows = static_cast<int32_t>(p.num_rows), num_ctas = static_cast<int32_t>(gridDim.x);
  const Index num_vecs = static_cast<Index>(p.row_size) / VEC;
  const uint32_t next_row = shared_address(&shared_storage_of_128<Vec>());  // (PARTS, num_vecs)
  const auto place_of = [&](int part, Index vec_idx) {
    return next_row + (part * num_vecs + vec_idx) * static_cast<uint32_t>(sizeof(Vec));
  };
  const auto ask_for = [&](int32_t row_idx) {
    if (row_idx < num_rows) {
      const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int i = 0; i < Cache::kCached; ++i) {
          const Index vec_idx = i * blockDim.x + threadIdx.x;
          if (vec_idx < num_vecs) cp_async_16(place_of(part, vec_idx), x + part * p.row_size + vec_idx * VEC, true);
        }
      }
    }
    cp_async_commit();
  };
  const auto loaded = [&](int part, Index vec_idx) {
    const uint4 words = load_shared_16_bytes(place_of(part, vec_idx));
    return *reinterpret_cast<const Vec*>(&words);
  };
  const auto load = [&](Index vec_idx) {
    if constexpr (!GATED) return loaded(0, vec_idx);
    if constexpr (GATED) return gated(p.activation, loaded(0, vec_idx), loaded(1, vec_idx));
  };

  ask_for(blockIdx.x);
#pragma unroll 1
  for (int32_t row_idx = blockIdx.x; row_idx < num_rows; row_idx += num_ctas) {
    cp_async_wait<0>();
    Cache row;
    row.fill(num_vecs, load);
    ask_for(row_idx + num_ctas);
    quantize_row<Q>(p, row, row_idx, load);
  }
}

// Least and largest element, as integers: as such, negative numbers are below 0, from which both begin.
template <typename Cache, bool GATED>
__global__ void __launch_bounds__(1024, GATED ? 1 : Cache::kCtasPerSm)
    quantize_rows_asymmetric_kernel(const __grid_constant__ QuantizeRowsParams p) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  grid_dependency_wait();
  grid_dependency_launch();
  const int32_t row_idx = blockIdx.x;
  const Index num_vecs = static_cast<Index>(p.row_size) / VEC;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  int8_t* const q = static_cast<int8_t*>(p.q) + row_idx * p.row_size;
  const auto load = [&](Index vec_idx) { return load_elements<GATED, VEC>(p, x + vec_idx * VEC); };

  Cache row;
  row.fill(num_vecs, load);
  int32_t above = 0, below = 0;  // the bits of high and of -low
  row.visit(num_vecs, load, [&](int, Index, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      above = max(above, __float_as_int(values[i]));
      below = max(below, __float_as_int(-values[i]));
    }
  });
  const auto larger = [](int32_t a, int32_t b) { return max(a, b); };
  above = block_reduce<0>(above, 0, larger);
  below = block_reduce<1>(below, 0, larger);
  const float high = __int_as_float(above), low = -__int_as_float(below);
  float scale = (high - low) / 255.0f;
  if (scale == 0.0f) scale = 1.0f;
  const float first = low / scale;  // a NaN becomes 0
  const float zero_point = rintf(fminf(-128.0f - (first == first ? first : 0.0f), 127.0f));
  if (threadIdx.x == 0) {
    p.scale[row_idx] = scale;
    p.zero_point[row_idx] = static_cast<int32_t>(zero_point);
  }

  row.visit(num_vecs, load, [&](int, Index vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC];
    unpack(vec, values);
    Pack<int8_t, VEC> rounded;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float quotient = values[i] / scale;
      const float code = (quotient == quotient ? quotient : 0.0f) + zero_point;
      rounded.words[i] = static_cast<int8_t>(max(-128, min(127, __float2int_rn(code))));
    }
    store_pack<VEC>(q + vec_idx * VEC, rounded);
  });
}

// VEC elements of a group lie beside each other in a lane: 8, or 1 where rows are not aligned.
template <typename T, typename Q, int VEC, bool GATED>
__global__ void __launch_bounds__(256) quantize_groups_kernel(const __grid_constant__ QuantizeRowsParams p) {
  constexpr int LANES = 16, PER_LANE = kQuantizeGroup / LANES;
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t num_groups = static_cast<int32_t>((p.row_size + kQuantizeGroup - 1) / kQuantizeGroup);
  const int32_t idx = static_cast<int32_t>(blockIdx.x) * (256 / LANES) + static_cast<int32_t>(threadIdx.x) / LANES;
  const int32_t row_idx = idx / num_groups, group_idx = idx - row_idx * num_groups;
  const bool is_there = row_idx < p.num_rows;
  const int64_t first = static_cast<int64_t>(group_idx) * kQuantizeGroup + threadIdx.x % LANES * VEC;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(is_there ? row_idx : 0);

  float values[PER_LANE] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; i += VEC) {
    const int64_t column = first + i * LANES;
    if (!is_there || column >= p.row_size) continue;
    float loaded[VEC];
    unpack(load_elements<GATED, VEC>(p, x + column), loaded);
#pragma unroll
    for (int j = 0; j < VEC; ++j) values[i + j] = loaded[j];
  }
  uint32_t largest = 0;
#pragma unroll
  for (float value : values) largest = max(largest, __float_as_uint(fabsf(value)));
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  if (!is_there) return;
  const float scale = scale_of<Q>(largest);
  if (threadIdx.x % LANES == 0) p.scale[group_idx * p.num_rows + row_idx] = scale;

  Q* const q = static_cast<Q*>(p.q) + row_idx * p.row_size;
#pragma unroll
  for (int i = 0; i < PER_LANE; i += VEC) {
    const int64_t column = first + i * LANES;
    if (column >= p.row_size) continue;
    Pack<Q, VEC> rounded;
#pragma unroll
    for (int j = 0; j < VEC; ++j) rounded.words[j] = Code<Q>::of(values[i + j] / scale);
    store_pack<VEC>(q + column, rounded);
  }
}

// Threads that an H100 has at the same time with 64 registers each. Where a call has more, gated rows take 32, and an
// SM reads one row while it rounds another.
constexpr int64_t kThreadsOfManyRegisters = 132 * 1024;

// Rows for each CTA from which on they are taken in turns: long ones, of which an SM has two at a time.
constexpr int64_t kLeastTurns = 2;

bool in_vectors(const QuantizeRowsParams& p) {
  return p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.q);
}

template <typename Q>
cudaError_t launch_of(const QuantizeRowsParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  return dispatch_half(p.dtype, [&](auto element) {
    return with_row_cache<decltype(element)>(p.row_size, in_vectors(p), [&](auto cache, int num_threads) {
      using Cache = decltype(cache);
      constexpr int CTAS = Cache::kCtasPerSm;
      if constexpr (sizeof(typename Cache::Vec) == 16 && !Cache::kLong) {
        const int64_t num_ctas = CTAS * p.num_sms;
        if (num_ctas > 0 && 1024 * CTAS / num_threads == CTAS && p.num_rows >= kLeastTurns * num_ctas) {
          const auto kernel =
              p.gated ? quantize_rows_in_turns_kernel<Cache, Q, true> : quantize_rows_in_turns_kernel<Cache, Q, false>;
          const int64_t smem_bytes = p.row_size * (p.gated ? 4 : 2);
          return launch_kernel_behind(kernel, num_ctas, num_threads, static_cast<int>(smem_bytes), stream, p);
        }
      }
      const bool many = p.num_rows * num_threads > kThreadsOfManyRegisters;
      const auto kernel = !p.gated ? quantize_rows_kernel<Cache, Q, false, CTAS>
                          : many   ? quantize_rows_kernel<Cache, Q, true, CTAS>
                                   : quantize_rows_kernel<Cache, Q, true, 1>;
      return launch_kernel_behind(kernel, p.num_rows, num_threads, 0, stream, p);
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

cudaError_t quantize_rows_asymmetric(const QuantizeRowsParams& p, cudaStream_t stream) {
  if (p.q_dtype != DType::kInt8) return cudaErrorInvalidValue;
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  return dispatch_half(p.dtype, [&](auto element) {
    return with_row_cache<decltype(element)>(p.row_size, in_vectors(p), [&](auto cache, int num_threads) {
      const auto kernel = p.gated ? quantize_rows_asymmetric_kernel<decltype(cache), true>
                                  : quantize_rows_asymmetric_kernel<decltype(cache), false>;
      return launch_kernel_behind(kernel, p.num_rows, num_threads, 0, stream, p);
    });
  });
}

cudaError_t quantize_groups(const QuantizeRowsParams& p, cudaStream_t stream) {
  if (p.q_dtype != DType::kFloat8E4M3) return cudaErrorInvalidValue;
  const int64_t num_groups = p.num_rows * ((p.row_size + kQuantizeGroup - 1) / kQuantizeGroup);
  if (num_groups > INT32_MAX - 16) return cudaErrorInvalidConfiguration;
  const int64_t num_ctas = (num_groups + 15) / 16;
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    using Q = __nv_fp8_e4m3;
    const bool vectors = in_vectors(p);
    const auto kernel = p.gated
                            ? (vectors ? quantize_groups_kernel<T, Q, 8, true> : quantize_groups_kernel<T, Q, 1, true>)
                        : vectors ? quantize_groups_kernel<T, Q, 8, false>
                                  : quantize_groups_kernel<T, Q, 1, false>;
    return launch_kernel_behind(kernel, num_ctas, 256, 0, stream, p);
  });
}

}  // namespace fastattn
