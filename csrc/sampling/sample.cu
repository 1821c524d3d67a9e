// Sampling without a sort: temperature, top-k, top-p (https://arxiv.org/abs/1904.09751), min-p
// (https://arxiv.org/abs/2407.01082), then the inverse CDF in order of token id.
//
//   w[i]   = exp((logits[i] - max) / temperature) in 2^-42 steps, an integer: the largest weighs exactly 2^42
//   keep   i if count(above i) < k, mass(above i) < top_p * mass(top-k), w[i] >= min_p     above: strictly larger logit
//   token  first id with  sum of kept w up to it  >  u * (sum of kept w),   u = Philox(seed, position) / 2^32
//
// Sums of integers do not depend on their order, so atomics are harmless here: the answer depends on the row alone.
//
// One CTA per row; the row is read a few times, from L2 after the first:
//
//   max, NaN? ──> greedy: done
//     │           ┌ 2048 bins by distance from the max;     ┐
//     ├─ top-k ──>│ what is not beyond the bin that the k-th│──> the smallest kept logit
//     ├─ top-p ──>│ (the mass p) falls into: into a list;   │
//     │           └ 4 x 256 bins by the bits of that bin's  ┘
//     └─ draw: 32 warps sum 32 runs of ids, the run that holds the target is cut into 32 again, down to 32 ids
//
// The first bins are by distance, not by bits, because logits share their exponent: equal bins would queue up at one
// atomic. Everything that comes after the first list reads the list (4096 logits in shared memory) instead of the row;
// where that many are not enough, the row. Latency bounds it (one CTA reads a row, with eight loads in flight a
// thread); several CTAs a row would be the next step.
#include "arch/dispatch.h"
#include "sampling/philox.cuh"
#include "sampling/row.cuh"
#include "sampling/sample.h"

namespace fastattn {
namespace {

template <typename T>
__global__ void __launch_bounds__(kNumThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  __shared__ SampleStorage smem;
  const int64_t row_idx = blockIdx.x;
  Row<T> row = {static_cast<const T*>(p.logits) + row_idx * p.logits_stride,
                p.vocab_size,
                0.0f,
                p.temperature[row_idx],
                smem.list,
                -1};

  const int32_t best_id = find_peak(row);
  if (best_id < 0 || row.temperature <= 0.0f) {
    if (threadIdx.x == 0) p.out[row_idx] = best_id;
    return;
  }
  const uint32_t smallest = limit(row, smem, p.top_k[row_idx], p.top_p[row_idx]);
  const float min_p = p.min_p[row_idx];
  const auto kept = [&](int32_t, float x) {
    return ordered(x) >= smallest && row.probability(x) >= min_p ? row.weight(x) : 0ull;
  };
  const uint32_t u = philox_first_word(p.seed[row_idx], p.position[row_idx]);
  const int32_t token = draw(row, smem, u, kept);
  if (threadIdx.x == 0) p.out[row_idx] = token;
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX || p.vocab_size > kSampleMaxVocab) return cudaErrorInvalidConfiguration;
  return dispatch_float(p.dtype, [&](auto element) {
    sample_kernel<decltype(element)><<<static_cast<unsigned>(p.num_rows), kNumThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace fastattn
