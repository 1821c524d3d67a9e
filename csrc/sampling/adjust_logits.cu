// Repetition (https://arxiv.org/abs/1909.05858), presence and frequency penalties (OpenAI's), and logit biases.
//
//   l = logits[b, token]                              for each entry (token, count, bias) of row b in a CSR list
//   l = (l > 0 ? l / rep : l * rep) - presence * [count > 0] - frequency * count      unless count is -1
//   logits[b, token] = l + bias
//
// Only what was touched is read and written, and what takes the time is that memory is asked twice: for the entry, and
// for its logit and its row's penalties. A thread has one entry, however long rows are. Whose it is, is the last row
// that begins at it or before: the CTA brings where rows begin, at the same time as its entries, and searches there.
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "sampling/adjust_logits.h"

namespace fastattn {
namespace {

constexpr int kAdjustThreads = 128;
constexpr int kMostBegins = 1024;  // that a CTA keeps; of more rows, those of every second, third and so on

__global__ void __launch_bounds__(kAdjustThreads)
    adjust_logits_kernel(const __grid_constant__ AdjustLogitsParams p, int32_t step, int32_t num_begins) {
  static __shared__ int32_t begins[kMostBegins + 1];  // the last is the end of all
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t num_rows = static_cast<int32_t>(p.num_rows);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAdjustThreads + threadIdx.x;
  const bool is_entry = i < p.nnz;
  const int32_t token = is_entry ? p.token_ids[i] : -1;
  const int32_t count = is_entry ? p.counts[i] : 0;
  const float bias = is_entry ? p.bias[i] : 0.0f;
#pragma unroll 1
  for (int32_t j = threadIdx.x; j <= num_begins; j += kAdjustThreads) begins[j] = p.indptr[min(j * step, num_rows)];
  __syncthreads();
  if (token < 0 || token >= p.vocab_size || i >= begins[num_begins]) return;

  int32_t first = 0, last = num_begins;  // the row is one of first … last - 1, in steps
#pragma unroll 1
  while (last - first > 1) {
    const int32_t middle = (first + last) / 2;
    (begins[middle] <= i ? first : last) = middle;
  }
  int32_t row = first * step;
#pragma unroll 1
  for (last = min(row + step, num_rows); last - row > 1;) {
    const int32_t middle = (row + last) / 2;
    (p.indptr[middle] <= i ? row : last) = middle;
  }

  float* const address = p.logits + row * p.logits_stride + token;
  float logit = *address;
  const float repetition = p.repetition_penalty[row];
  const float presence = p.presence_penalty[row];
  const float frequency = p.frequency_penalty[row];
  if (count >= 0) {
    logit = logit > 0.0f ? logit / repetition : logit * repetition;
    logit -= (count > 0 ? presence : 0.0f) + frequency * static_cast<float>(count);
  }
  *address = logit + bias;
}

}  // namespace

cudaError_t adjust_logits(const AdjustLogitsParams& p, cudaStream_t stream) {
  const int64_t num_ctas = (p.nnz + kAdjustThreads - 1) / kAdjustThreads;
  if (num_ctas > INT32_MAX || p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (num_ctas == 0) return cudaSuccess;
  const int32_t num_rows = static_cast<int32_t>(p.num_rows);
  const int32_t step = (num_rows - 1) / kMostBegins + 1;
  return launch_kernel_behind(adjust_logits_kernel, num_ctas, kAdjustThreads, 0, stream, p, step,
                              (num_rows - 1) / step + 1);
}

}  // namespace fastattn
