// Sampling without a sort: temperature, top-k, top-p (https://arxiv.org/abs/1904.09751), min-p
// (https://arxiv.org/abs/2407.01082), then the inverse CDF in order of token id.
//
//   w[i]   = exp((logits[i] - max) / temperature) in 2^-42 steps, an integer: the largest weighs exactly 2^42
//   keep   i if count(above i) < k, mass(above i) < top_p * mass(top-k), w[i] >= min_p     above: strictly larger logit
//   token  first id with  sum of kept w up to it  >  u * (sum of kept w),   u = Philox(seed, position) / 2^32
//
// Sums of integers do not depend on their order, so atomics are harmless here: the answer depends on the row alone.
//
// A row is shared by the CTAs of a cluster, 1 to 8, a run of ids each; what they add up meets in their shared memory,
// and the token is the same however many they are. They read it a few times, from L2 after the first:
//
//   max, NaN? ──> greedy: done
//     │           ┌ 2048 bins by distance from the max;     ┐
//     ├─ top-k ──>│ what is not beyond the bin that the k-th│──> the smallest kept logit
//     ├─ top-p ──>│ (the mass p) falls into: into a list;   │
//     │           └ 4 x 256 bins by the bits of that bin's  ┘
//     └─ draw: 32 warps a CTA sum runs of ids, the run that holds the target is cut into 32 again, down to 32 ids
//
// The first bins are by distance, not by bits, because logits share their exponent: equal bins would queue up at one
// atomic. Everything that comes after the first list reads the list (4096 logits a CTA, in shared memory) instead of
// the row; where that many are not enough, the row. Instructions bound it, about 80 a logit.
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "sampling/philox.cuh"
#include "sampling/row.cuh"
#include "sampling/sample.h"

namespace fastattn {
namespace {

constexpr int64_t kMostCtas = 8;     // of a row: what every GPU with clusters can place
constexpr int64_t kLeastIds = 4096;  // of a CTA

template <typename T>
__device__ void sample_row(const SampleParams& p, Row<T>& row, SampleStorage& smem, int64_t row_idx) {
  const int32_t best_id = find_peak(row, smem);
  if (best_id < 0 || row.temperature <= 0.0f) {
    if (threadIdx.x == 0 && row.team.rank == 0) p.out[row_idx] = best_id;
    return;
  }
  const uint32_t smallest = limit(row, smem, p.top_k[row_idx], p.top_p[row_idx]);
  const float min_p = p.min_p[row_idx];
  const auto kept = [&](int32_t, float x) {
    return ordered(x) >= smallest && row.probability(x) >= min_p ? row.weight(x) : 0ull;
  };
  const uint32_t u = philox_first_word(p.seed[row_idx], p.position[row_idx]);
  const int32_t token = draw(row, smem, u, kept);
  if (threadIdx.x == 0 && token >= 0) p.out[row_idx] = token;
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  __shared__ SampleStorage smem;
  grid_dependency_launch();
  grid_dependency_wait();  // whoever makes the logits may let this kernel begin before it has ended
  const Team team = Team::of_cluster();
  const int64_t row_idx = blockIdx.x / team.num_ctas;
  Row<T> row = {static_cast<const T*>(p.logits) + row_idx * p.logits_stride, p.vocab_size, p.temperature[row_idx],
                smem.list};
  row.share(team);
  sample_row(p, row, smem, row_idx);
  if (team.num_ctas > 1) cluster_meet();  // the others may still read from this CTA
}

// As many as there are SMs for, a power of two.
int64_t ctas_of_row(const SampleParams& p) {
  int64_t num_ctas = 1;
  while (num_ctas < kMostCtas && 2 * num_ctas * p.num_rows <= p.num_sms && 2 * num_ctas * kLeastIds <= p.vocab_size) {
    num_ctas *= 2;
  }
  return num_ctas;
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX || p.vocab_size > kSampleMaxVocab) return cudaErrorInvalidConfiguration;
  const int64_t num_ctas = ctas_of_row(p);
  return dispatch_float(p.dtype, [&](auto element) {
    const auto kernel = sample_kernel<decltype(element)>;
    if (num_ctas == 1) return launch_kernel(kernel, p.num_rows, kNumThreads, 0, stream, p);
    return launch_clusters(kernel, p.num_rows * num_ctas, static_cast<int>(num_ctas), kNumThreads, 0, stream, p);
  });
}

}  // namespace fastattn
