// Rejection sampling of a drafted token (https://arxiv.org/abs/2211.17192, https://arxiv.org/abs/2302.01318).
//
//   p, q   what sample.cu draws from logits and from draft_logits, under the same limits; x ~ q is the draft
//   token  x           if u1 * q[x] < p[x]                       u1, u2: 2nd and 3rd word of Philox(seed, position) /
//   2^32
//          first id with  sum of r up to it  >  u2 * (sum of r)  otherwise, r[i] = max(p[i] - q[i], 0)
//
// p and q are weights over their sum, in 2^-42 steps, integers again: the sum of r does not depend on its order. Where
// r is 0 everywhere p and q are the same but for rounding, and p itself is drawn from.
//
// One CTA per row, one row after the other in the same shared memory:
//
//   target: max, NaN? ──> greedy, or nothing: done
//     ├─ no draft, or its logits are no numbers ──> drawn as sample.cu does
//     └─ limits, sum ──> draft row: limits, sum ──> accept? done ──> sum of r ──> draw
#include "arch/dispatch.h"
#include "sampling/philox.cuh"
#include "sampling/row.cuh"
#include "sampling/speculative_sample.h"

namespace fastattn {
namespace {

constexpr double kProbabilityOne = 4398046511104.0;  // 2^42

// A row under its limits. `scale` makes probabilities of weights.
template <typename T>
struct Limited {
  Row<T> row;
  uint32_t smallest = 0;
  float min_p = 0.0f;
  double scale = 0.0;

  __device__ __forceinline__ unsigned long long weight(float x) const {
    return ordered(x) >= smallest && row.probability(x) >= min_p ? row.weight(x) : 0ull;
  }
  __device__ __forceinline__ double probability(int32_t id) const {
    return static_cast<double>(weight(row.logit(id))) * scale;
  }
  __device__ __forceinline__ unsigned long long fixed_probability(float x) const {
    return static_cast<unsigned long long>(static_cast<double>(weight(x)) * scale + 0.5);
  }
};

template <typename T>
__device__ void set_limits(Limited<T>& out, SampleStorage& smem, const SampleParams& p, int64_t row_idx) {
  out.smallest = limit(out.row, smem, p.top_k[row_idx], p.top_p[row_idx]);
  out.min_p = p.min_p[row_idx];
  unsigned long long total = 0;
  out.row.each_id([&](int32_t, float x) { total += out.weight(x); });
  out.scale = kProbabilityOne / static_cast<double>(out.row.team.sum(smem, total));  // the peak is always kept
  __syncthreads();  // the list is the next row's from here on
  out.row.list_size = -1;
}

template <typename T>
__global__ void __launch_bounds__(kNumThreads, 1)
    speculative_sample_kernel(const __grid_constant__ SpeculativeSampleParams params) {
  __shared__ SampleStorage smem;
  const SampleParams& p = params.target;
  const int64_t row_idx = blockIdx.x;
  const auto answer = [&](int32_t token) {
    if (threadIdx.x == 0) p.out[row_idx] = token;
  };
  const auto row_of = [&](const void* logits, int64_t idx, int64_t stride) {
    return Row<T>{static_cast<const T*>(logits) + idx * stride, p.vocab_size, p.temperature[row_idx], smem.list};
  };

  Limited<T> target, draft;
  int32_t draft_row = -1, token = -1;
  bool is_drafted = false;
  // A turn for each row, and one draw for all ends: what is done with a row is large, and nvcc takes seconds for every
  // copy of it.
#pragma unroll 1
  for (bool first = true;; first = false) {
    Limited<T> limited;
    limited.row = first ? row_of(p.logits, row_idx, p.logits_stride)
                        : row_of(params.draft_logits, draft_row, params.draft_stride);
    const int32_t best_id = find_peak(limited.row, smem);
    if (first) {
      if (best_id < 0 || limited.row.temperature <= 0.0f) return answer(best_id);
    } else {
      is_drafted = best_id >= 0;
      if (!is_drafted) break;
    }
    set_limits(limited, smem, p, row_idx);
    if (!first) {
      draft = limited;
      break;
    }
    target = limited;
    draft_row = params.draft_rows[row_idx];
    if (draft_row < 0 || draft_row >= params.num_draft_rows) break;
    token = params.draft_token_ids[row_idx];
    if (token < 0 || token >= p.vocab_size) break;
  }

  const auto left = [&](int32_t id, float x) {
    const unsigned long long ours = target.fixed_probability(x);
    const unsigned long long theirs = draft.fixed_probability(draft.row.logit(id));
    return ours > theirs ? ours - theirs : 0ull;
  };
  const uint4 words = philox_words(p.seed[row_idx], p.position[row_idx]);
  uint32_t u = words.x;
  bool any_left = false;
  if (is_drafted) {
    const double accept = static_cast<double>(words.y) * 0x1p-32;
    if (accept * draft.probability(token) < target.probability(token)) return answer(token);
    u = words.z;
    unsigned long long total = 0;
    target.row.each_id([&](int32_t id, float x) { total += left(id, x); });
    any_left = target.row.team.sum(smem, total) != 0;
  }
  answer(draw(target.row, smem, u, [&](int32_t id, float x) { return any_left ? left(id, x) : target.weight(x); }));
}

}  // namespace

cudaError_t speculative_sample(const SpeculativeSampleParams& params, cudaStream_t stream) {
  const SampleParams& p = params.target;
  if (p.num_rows > INT32_MAX || p.vocab_size > kSampleMaxVocab) return cudaErrorInvalidConfiguration;
  return dispatch_float(p.dtype, [&](auto element) {
    speculative_sample_kernel<decltype(element)><<<static_cast<unsigned>(p.num_rows), kNumThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

}  // namespace fastattn
