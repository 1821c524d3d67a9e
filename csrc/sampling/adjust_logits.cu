// Repetition (https://arxiv.org/abs/1909.05858), presence and frequency penalties (OpenAI's), and logit biases.
//
//   l = logits[b, token]                              for each entry (token, count, bias) of row b in a CSR list
//   l = (l > 0 ? l / rep : l * rep) - presence * [count > 0] - frequency * count      unless count is -1
//   logits[b, token] = l + bias
//
// One CTA per row; its threads walk the row's entries. Only what was touched is read and written.
#include "sampling/adjust_logits.h"

namespace fastattn {
namespace {

constexpr int kNumThreads = 256;

__global__ void __launch_bounds__(kNumThreads) adjust_logits_kernel(const __grid_constant__ AdjustLogitsParams p) {
  const int64_t row_idx = blockIdx.x;
  float* const logits = p.logits + row_idx * p.logits_stride;
  const float repetition = p.repetition_penalty[row_idx];
  const float presence = p.presence_penalty[row_idx];
  const float frequency = p.frequency_penalty[row_idx];
  const int64_t begin = max(p.indptr[row_idx], 0);
  const int64_t end = min(static_cast<int64_t>(p.indptr[row_idx + 1]), p.nnz);
  for (int64_t i = begin + threadIdx.x; i < end; i += kNumThreads) {
    const int32_t token = p.token_ids[i];
    if (token < 0 || token >= p.vocab_size) continue;
    const int32_t count = p.counts[i];
    float logit = logits[token];
    if (count >= 0) {
      logit = logit > 0.0f ? logit / repetition : logit * repetition;
      logit -= (count > 0 ? presence : 0.0f) + frequency * static_cast<float>(count);
    }
    logits[token] = logit + p.bias[i];
  }
}

}  // namespace

cudaError_t adjust_logits(const AdjustLogitsParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  adjust_logits_kernel<<<static_cast<unsigned>(p.num_rows), kNumThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fastattn
