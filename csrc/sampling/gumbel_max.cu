// The two kernels of gumbel_max.h. A CTA of the first takes kGumbelPartSize ids of a row, of the second a row's
// choices.
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "arch/shared_memory.cuh"
#include "sampling/gumbel_max.cuh"
#include "sampling/gumbel_max.h"

namespace fastattn {
namespace {

constexpr int kGumbelThreads = 256;
constexpr int kGumbelWarps = kGumbelThreads / 32;

struct Storage {
  uint64_t of_warps[kGumbelWarps];
};
constexpr int kSmemBytes = sizeof(Storage) + 1024;

// Of all threads of a CTA, once.
__device__ __forceinline__ uint64_t best_of_threads(uint64_t choice) {
  Storage& smem = shared_storage<Storage>();
  const int lane = threadIdx.x % 32;
  choice = warp_reduce(choice, better_choice);
  if (lane == 0) smem.of_warps[threadIdx.x / 32] = choice;
  __syncthreads();
  return warp_reduce(lane < kGumbelWarps ? smem.of_warps[lane] : kNoChoice, better_choice);
}

template <typename T>
__global__ void __launch_bounds__(kGumbelThreads) gumbel_choices_kernel(const __grid_constant__ GumbelMaxParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t row_idx = blockIdx.x / p.num_parts;
  const int32_t begin = static_cast<int32_t>(blockIdx.x - row_idx * p.num_parts) * kGumbelPartSize;
  const int32_t end = min(begin + kGumbelPartSize, p.vocab_size);
  const GumbelRow row = GumbelRow::of(p.temperature, p.seed, p.position, row_idx);
  const T* const of_row = static_cast<const T*>(p.logits) + row_idx * p.vocab_size;
  uint64_t best = kNoChoice;
  for (int32_t column = begin + static_cast<int32_t>(threadIdx.x) * 4; column < end; column += 4 * kGumbelThreads) {
    float logits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[i] = column + i < end ? to_float(of_row[column + i]) : 0.0f;
    best = better_choice(best, best_of_four(row, logits, p.first_id + column, end - column));
  }
  best = best_of_threads(best);
  if (threadIdx.x == 0) p.choices[blockIdx.x] = best;
}

__global__ void __launch_bounds__(kGumbelThreads) best_choices_kernel(const __grid_constant__ GumbelMaxParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const uint64_t* const of_row = p.choices + blockIdx.x * p.num_parts;
  uint64_t best = kNoChoice;
  for (int64_t i = threadIdx.x; i < p.num_parts; i += kGumbelThreads) best = better_choice(best, of_row[i]);
  best = best_of_threads(best);
  if (threadIdx.x == 0) {
    p.token_ids[blockIdx.x] = token_of_choice(best);
    p.scores[blockIdx.x] = score_of_choice(best);
  }
}

}  // namespace

cudaError_t gumbel_choices(const GumbelMaxParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX / p.num_parts) return cudaErrorInvalidConfiguration;
  return dispatch_float(p.dtype, [&](auto element) {
    return launch_kernel_behind(gumbel_choices_kernel<decltype(element)>, p.num_rows * p.num_parts, kGumbelThreads,
                                kSmemBytes, stream, p);
  });
}

cudaError_t best_choices(const GumbelMaxParams& p, cudaStream_t stream) {
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel_behind(best_choices_kernel, p.num_rows, kGumbelThreads, kSmemBytes, stream, p);
}

}  // namespace fastattn
