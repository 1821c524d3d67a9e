// Merges attention over two disjoint sets of keys (https://arxiv.org/abs/2501.01005, section 2.2).
//
//   lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
//
//   out_a, out_b, out (B, S, H, D) bf16, fp16 or fp32   lse_a, lse_b, lse (B, H, S) fp32
//
// One CTA per (batch, row); a thread makes 16 bytes of a head at a time. Memory bounds it: a side's LSE is 1 / (D / 2)
// of what it reads, and comes from the cache for all but one thread of a head.
//
// A side whose LSE is infinite saw no key: what is in its out is not used, not even times zero, as it may be NaN.
#include "arch/dispatch.h"
#include "arch/fast_divide.h"
#include "arch/vec.cuh"
#include "attention/merge_states.h"

namespace fastattn {
namespace {

constexpr int kMergeThreads = 256;

template <typename T, int VEC>
__device__ __forceinline__ void add_weighted(const AttentionState& side, int64_t offset, float weight,
                                             float (&sum)[VEC]) {
  if (weight == 0.0f) return;
  float values[VEC];
  load_vec<VEC>(static_cast<const T*>(side.out) + offset, values);
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum[i] += weight * values[i];
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states_kernel(const __grid_constant__ MergeStatesParams p, FastDivide vecs_per_head) {
  const int64_t batch_idx = blockIdx.x / p.num_rows;
  const int64_t row_idx = blockIdx.x - batch_idx * p.num_rows;
  T* const out_row = static_cast<T*>(p.out) + static_cast<int64_t>(blockIdx.x) * p.num_heads * p.head_dim;
  const int32_t num_vecs = p.num_heads * vecs_per_head.divisor;

  for (int32_t vec_idx = threadIdx.x; vec_idx < num_vecs; vec_idx += blockDim.x) {
    const int32_t head_idx = vecs_per_head.divide(vec_idx);
    const int32_t column = (vec_idx - head_idx * vecs_per_head.divisor) * VEC;
    const auto lse_of = [&](const AttentionState& side) {
      const float lse = side.lse[batch_idx * side.lse_batch_stride + head_idx * side.lse_head_stride + row_idx];
      return lse == INFINITY ? -INFINITY : lse;
    };
    const float lse_a = lse_of(p.a);
    const float lse_b = lse_of(p.b);
    const float peak = fmaxf(lse_a, lse_b);
    const float reference = peak == -INFINITY ? 0.0f : peak;  // both empty: exp(-inf - 0) = 0, not NaN
    float weight_a = expf(lse_a - reference);
    float weight_b = expf(lse_b - reference);
    const float total = weight_a + weight_b;
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    if (column == 0) p.lse[(batch_idx * p.num_heads + head_idx) * p.num_rows + row_idx] = reference + logf(total);

    const auto offset_of = [&](const AttentionState& side) {
      return batch_idx * side.batch_stride + row_idx * side.row_stride + head_idx * side.head_stride + column;
    };
    float sum[VEC] = {};
    add_weighted<T, VEC>(p.a, offset_of(p.a), weight_a * scale, sum);
    add_weighted<T, VEC>(p.b, offset_of(p.b), weight_b * scale, sum);
    store_vec<VEC>(out_row + static_cast<int64_t>(head_idx) * p.head_dim + column, sum);
  }
}

template <typename T, int VEC>
cudaError_t launch(const MergeStatesParams& p, cudaStream_t stream) {
  const int64_t num_ctas = p.batch * p.num_rows;
  const int32_t vecs_per_head = p.head_dim / VEC;
  const int64_t num_vecs = static_cast<int64_t>(p.num_heads) * vecs_per_head;
  if (num_ctas > INT32_MAX || num_vecs > INT32_MAX - kMergeThreads) return cudaErrorInvalidConfiguration;
  const unsigned num_threads =
      num_vecs >= kMergeThreads ? kMergeThreads : static_cast<unsigned>((num_vecs + 31) / 32 * 32);
  merge_states_kernel<T, VEC>
      <<<static_cast<unsigned>(num_ctas), num_threads, 0, stream>>>(p, FastDivide(vecs_per_head));
  return cudaGetLastError();
}

// Whether 16 bytes can be loaded at a time from every head.
bool aligned(const AttentionState& side, int64_t vec) {
  return reinterpret_cast<uintptr_t>(side.out) % 16 == 0 && side.batch_stride % vec == 0 &&
         side.row_stride % vec == 0 && side.head_stride % vec == 0;
}

}  // namespace

cudaError_t merge_states(const MergeStatesParams& p, cudaStream_t stream) {
  return dispatch_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVec = 16 / sizeof(T);
    const bool vectors = p.head_dim % kVec == 0 && aligned(p.a, kVec) && aligned(p.b, kVec);
    return vectors ? launch<T, kVec>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace fastattn
