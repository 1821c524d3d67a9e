// Forbids tokens by a bit each.
//
//   logits[rows[r], t] = -inf     where bit t % 32 of bitmask[r, t / 32] is 0
//
// A warp takes 32 tokens at a time: all its lanes have one word, each looks at its own bit, and those that find 0
// write. Logits are never read, and what is allowed is not written: a mask that allows little writes V * 4 bytes, one
// that allows much only itself is read. And a row may be named by several masks at once. All of a thread's words are
// asked for before it writes, or each would wait for the memory behind the one before.
//
// Grid: a CTA per piece of 2048 tokens of a mask.
#include <algorithm>
#include <cmath>

#include "arch/fast_divide.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "sampling/apply_token_bitmask.h"

namespace fastattn {
namespace {

constexpr int kNumThreads = 256;
constexpr int kTokensPerThread = 8;
constexpr int64_t kTokensPerCta = kNumThreads * kTokensPerThread;

__global__ void __launch_bounds__(kNumThreads)
    apply_token_bitmask_kernel(const __grid_constant__ ApplyTokenBitmaskParams p, FastDivide pieces_per_mask) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int64_t mask_idx = pieces_per_mask.divide(blockIdx.x);
  const int64_t first = pieces_per_mask.remainder(blockIdx.x) * kTokensPerCta + threadIdx.x;
  const int32_t num_left = static_cast<int32_t>(min(p.vocab_size - first, kTokensPerCta));
  const int32_t* const words = p.bitmask + mask_idx * p.bitmask_stride + first / 32;
  const int32_t row_idx = p.rows[mask_idx];
  uint32_t word[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    word[i] = i * kNumThreads < num_left ? static_cast<uint32_t>(words[i * kNumThreads / 32]) : 0xffffffffu;
  }
  if (row_idx < 0 || row_idx >= p.num_rows) return;
  float* const logits = p.logits + row_idx * p.logits_stride + first;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    if ((word[i] >> (threadIdx.x % 32) & 1u) == 0) logits[i * kNumThreads] = -INFINITY;
  }
}

}  // namespace

cudaError_t apply_token_bitmask(const ApplyTokenBitmaskParams& p, cudaStream_t stream) {
  const int64_t pieces = (p.vocab_size + kTokensPerCta - 1) / kTokensPerCta;
  if (pieces > INT32_MAX || p.num_masks > INT32_MAX / pieces) return cudaErrorInvalidConfiguration;
  return launch_kernel_behind(apply_token_bitmask_kernel, p.num_masks * pieces, kNumThreads, 0, stream, p,
                              FastDivide(static_cast<int32_t>(pieces)));
}

}  // namespace fastattn
