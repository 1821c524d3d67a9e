// RMSNorm (https://arxiv.org/abs/1910.07467), with or without the addition to the residual stream before it.
//
//   residual[r, :] = round(x[r, :] + residual[r, :])                                 with a residual only
//   out[r, :]      = round(h[r, :] * rsqrt(mean(h[r, :]^2) + eps) * weight)          h = residual, or x
//
//   x, residual, out (rows, N) bf16 or fp16   weight (N)   fp32 arithmetic
//
// or out in int8 or e4m3 with a scale a row, as quantize_rows makes it of that out, in the same bits: of 6 and 3 bytes
// an element, or 8 and 3 with a residual, 3 and 7 are left, and one launch of two.
//
// One CTA per row. Memory bounds it: each element is read once and written once.
//
//   load row ──> add, round, store residual, squares ──> ask for the weight ──> CTA sum ──> scale, store
//          └──────────────── the row stays in registers (norm/row_cache.cuh) ────────────────┘
//
//   8 bits: … ──> CTA sum ──> scale, round ──> CTA maximum ──> divide, round, store
//
// All loads of the row are asked for before the first is used: one latency of memory, not two.
//
// Rows that are not 16-byte aligned, or not a multiple of 8 long, take VEC = 1.
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "elementwise/eight_bits.cuh"
#include "norm/rms_norm.h"
#include "norm/row_cache.cuh"

namespace fastattn {
namespace {

// Q: of the results, T or 8 bits.
template <typename Cache, bool ADD, typename Q>
__global__ void __launch_bounds__(1024, Cache::kCtasPerSm)
    rms_norm_kernel(float inverse_size, typename Cache::Index num_vecs, const __grid_constant__ RmsNormParams p) {
  using T = typename Cache::T;
  using Index = typename Cache::Index;
  constexpr int VEC = Cache::VEC;
  const int32_t row_idx = blockIdx.x;
  const T* const x = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx);
  T* const residual = ADD ? static_cast<T*>(p.residual) + p.residual_rows.offset(row_idx) : nullptr;
  Q* const out = static_cast<Q*>(p.out) + row_idx * p.row_size;
  const T* const weight = static_cast<const T*>(p.weight);
  const auto load_from = [](const T* values) {
    return [values](Index vec_idx) { return load_pack_early<VEC>(values + vec_idx * VEC); };
  };
  const auto ones = [](Index) { return pack_of<T, VEC>(1.0f); };
  const auto load_weight = [&](Index vec_idx) {
    return weight != nullptr ? load_from(weight)(vec_idx) : ones(vec_idx);
  };
  grid_dependency_launch();
  grid_dependency_wait();

  Cache row, old, gain;
  row.fill(num_vecs, load_from(x));
  if constexpr (ADD) old.fill(num_vecs, load_from(residual));

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
  if (weight != nullptr) {
    gain.fill(num_vecs, load_from(weight));
  } else {
    gain.fill(num_vecs, ones);
  }
  const float scale = rsqrtf(block_sum<0>(square_sum) * inverse_size + p.eps);

  const auto normalized = [&](int slot, Index vec_idx, const Pack<T, VEC>& vec) {
    float values[VEC], factors[VEC];
    unpack(vec, values);
    unpack(gain.at(slot, vec_idx, load_weight), factors);
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = values[i] * scale * factors[i];
    return packed<T>(values);
  };
  const auto load_again = load_from(ADD ? residual : x);
  if constexpr (std::is_same_v<Q, T>) {
    row.visit(num_vecs, load_again, [&](int slot, Index vec_idx, const Pack<T, VEC>& vec) {
      store_pack<VEC>(out + vec_idx * VEC, normalized(slot, vec_idx, vec));
    });
  } else {
    uint32_t largest = 0;
    row.visit(num_vecs, load_again, [&](int slot, Index vec_idx, Pack<T, VEC>& vec) {
      vec = normalized(slot, vec_idx, vec);  // stays so in registers
      largest = largest_magnitude(largest, vec);
    });
    const Divider divide(scale_of<Q>(block_reduce<0>(largest, 0u, [](uint32_t a, uint32_t b) { return max(a, b); })));
    if (threadIdx.x == 0) p.scale[row_idx] = divide.by;
    row.visit(num_vecs, load_again, [&](int slot, Index vec_idx, const Pack<T, VEC>& vec) {
      const bool is_normalized = !Cache::kLong || slot < Cache::kCached;
      store_pack<VEC>(out + vec_idx * VEC, codes_of<Q>(is_normalized ? vec : normalized(slot, vec_idx, vec), divide));
    });
  }
}

// Q: void for that of x.
template <typename Q>
cudaError_t launch_of(const RmsNormParams& p, cudaStream_t stream) {
  const bool vectors = p.row_size % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out) &&
                       aligned_rows(p.weight) && aligned_rows(p.residual, p.residual_rows);
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    using Out = std::conditional_t<std::is_void_v<Q>, T, Q>;
    return with_row_cache<T>(p.row_size, vectors, [&](auto cache, int num_threads) {
      using Cache = decltype(cache);
      const auto kernel =
          p.residual != nullptr ? rms_norm_kernel<Cache, true, Out> : rms_norm_kernel<Cache, false, Out>;
      const float inverse_size = 1.0f / static_cast<float>(p.row_size);
      const typename Cache::Index num_vecs = p.row_size / Cache::VEC;
      return launch_kernel_behind(kernel, p.num_rows, num_threads, 0, stream, inverse_size, num_vecs, p);
    });
  });
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (p.scale == nullptr) return launch_of<void>(p, stream);
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
