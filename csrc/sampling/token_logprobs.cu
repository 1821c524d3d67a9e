// Log-softmax of single tokens of a row, without writing the whole of it.
//
//   lse        = max + log(sum_i exp(logits[i] - max))
//   chosen     = logits[token] - lse      rank = 1 + count(logits[i] > logits[token])
//   top[j]     = j-th largest logit - lse, the lowest id first among equals
//
// One CTA per row. Pass 1 finds the maximum, pass 2 the sum and the rank. The best come one by one: each thread holds
// the best of the ids that it owns (id % 1024), the CTA takes the best of those, and the thread that lost it looks for
// its next. So num_top costs num_top CTA reductions, not a sort of the vocabulary; num_top is small (20 at most in the
// OpenAI API).
#include <cmath>

#include "arch/dispatch.h"
#include "arch/reduce.cuh"
#include "arch/vec.cuh"
#include "sampling/order.cuh"
#include "sampling/token_logprobs.h"

namespace fastattn {
namespace {

constexpr int kLogprobThreads = 1024;

template <typename T>
__global__ void __launch_bounds__(kLogprobThreads, 1)
    token_logprobs_kernel(const __grid_constant__ TokenLogprobsParams p) {
  const int64_t row_idx = blockIdx.x;
  const T* const logits = static_cast<const T*>(p.logits) + row_idx * p.logits_stride;
  const auto larger = [](unsigned long long a, unsigned long long b) { return a > b ? a : b; };

  // The best of this thread's ids that ranks below `limit`.
  const auto own_best = [&](unsigned long long limit) {
    unsigned long long best = 0;
#pragma unroll 4
    for (int32_t id = threadIdx.x; id < p.vocab_size; id += kLogprobThreads) {
      const unsigned long long rank = ranked(to_float(logits[id]), id);
      if (rank < limit) best = larger(best, rank);
    }
    return best;
  };
  unsigned long long own = own_best(~0ull);
  unsigned long long best = block_reduce(own, 0ull, larger);
  const float peak = to_float(logits[ranked_id(best)]);

  const int32_t token = p.token_ids[row_idx];
  const bool known = token >= 0 && token < p.vocab_size;
  const float chosen = known ? to_float(logits[token]) : NAN;
  float sum = 0.0f;
  int32_t num_above = 0;
#pragma unroll 4
  for (int32_t id = threadIdx.x; id < p.vocab_size; id += kLogprobThreads) {
    const float x = to_float(logits[id]);
    sum += expf(x - peak);
    num_above += x > chosen;
  }
  sum = block_sum(sum);
  num_above = block_reduce(num_above, 0, [](int32_t a, int32_t b) { return a + b; });
  const float lse = peak + logf(sum);
  if (threadIdx.x == 0) {
    p.chosen[row_idx] = chosen - lse;
    p.rank[row_idx] = known ? num_above + 1 : 0;
  }

  for (int32_t j = 0; j < p.num_top; ++j) {
    if (threadIdx.x == 0) {
      p.top[row_idx * p.num_top + j] = to_float(logits[ranked_id(best)]) - lse;
      p.top_ids[row_idx * p.num_top + j] = ranked_id(best);
    }
    if (own == best) own = own_best(best);
    best = block_reduce(own, 0ull, larger);
    if (best == 0) break;  // all ids are out
  }
}

}  // namespace

cudaError_t token_logprobs(const TokenLogprobsParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  return dispatch_float(p.dtype, [&](auto element) {
    token_logprobs_kernel<decltype(element)><<<static_cast<unsigned>(p.num_rows), kLogprobThreads, 0, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace fastattn
