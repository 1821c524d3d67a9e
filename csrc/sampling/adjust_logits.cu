// Repetition (https://arxiv.org/abs/1909.05858), presence and frequency penalties (OpenAI's), and logit biases.
//
//   l = logits[b, token]                              for each entry (token, count, bias) of row b in a CSR list
//   l = (l > 0 ? l / rep : l * rep) - presence * [count > 0] - frequency * count      unless count is -1
//   logits[b, token] = l + bias
//
// Only what was touched is read and written. What takes the time is that memory is asked thrice, for where the row
// begins, for its entries, for their logits; so as many CTAs share a row as give every thread one entry if rows are
// equally long.
#include <algorithm>

#include "arch/fast_divide.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "sampling/adjust_logits.h"

namespace fastattn {
namespace {

constexpr int kNumThreads = 256;

__global__ void __launch_bounds__(kNumThreads)
    adjust_logits_kernel(const __grid_constant__ AdjustLogitsParams p, FastDivide ctas_per_row) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int64_t row_idx = ctas_per_row.divide(blockIdx.x);
  float* const logits = p.logits + row_idx * p.logits_stride;
  const float repetition = p.repetition_penalty[row_idx];
  const float presence = p.presence_penalty[row_idx];
  const float frequency = p.frequency_penalty[row_idx];
  const int64_t begin = max(p.indptr[row_idx], 0);
  const int64_t end = min(static_cast<int64_t>(p.indptr[row_idx + 1]), p.nnz);
  const int32_t first = ctas_per_row.remainder(blockIdx.x) * kNumThreads + threadIdx.x;
#pragma unroll 1
  for (int64_t i = begin + first; i < end; i += kNumThreads * ctas_per_row.divisor) {
    const int32_t token = p.token_ids[i];
    const int32_t count = p.counts[i];
    const float bias = p.bias[i];
    if (token < 0 || token >= p.vocab_size) continue;
    float logit = logits[token];
    if (count >= 0) {
      logit = logit > 0.0f ? logit / repetition : logit * repetition;
      logit -= (count > 0 ? presence : 0.0f) + frequency * static_cast<float>(count);
    }
    logits[token] = logit + bias;
  }
}

}  // namespace

cudaError_t adjust_logits(const AdjustLogitsParams& p, cudaStream_t stream) {
  const int64_t num_ctas = (p.nnz + kNumThreads - 1) / kNumThreads;
  const int64_t ctas_per_row = std::clamp<int64_t>((num_ctas + p.num_rows - 1) / p.num_rows, 1, INT32_MAX);
  if (p.num_rows > INT32_MAX / ctas_per_row) return cudaErrorInvalidConfiguration;
  return launch_kernel_behind(adjust_logits_kernel, p.num_rows * ctas_per_row, kNumThreads, 0, stream, p,
                              FastDivide(static_cast<int32_t>(ctas_per_row)));
}

}  // namespace fastattn
