// Forbids tokens by a bit each.
//
//   logits[rows[r], t] = -inf     where bit t % 32 of bitmask[r, t / 32] is 0
//
// A lane has a word of a mask, a warp 1024 tokens: one word after the other, all lanes look at their own bit of it, and
// those that find 0 write. Logits are never read, and what is allowed is not written: a row may be named by several
// masks at once.
//
// Where a word forbids some of its tokens but not all, parts of 32-byte sectors are written, for which the memory reads
// them one by one when they leave L2. Asked for in front of the store, they come many at a time.
//
// Grid: a CTA per piece of 8192 tokens of a mask.
#include <algorithm>
#include <cmath>

#include "arch/fast_divide.h"
#include "arch/global_memory.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "sampling/apply_token_bitmask.h"

namespace fastattn {
namespace {

constexpr int kBitmaskThreads = 256;
constexpr int64_t kTokensPerCta = kBitmaskThreads * 32;

__global__ void __launch_bounds__(kBitmaskThreads)
    apply_token_bitmask_kernel(const __grid_constant__ ApplyTokenBitmaskParams p, FastDivide pieces_per_mask) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t mask_idx = pieces_per_mask.divide(blockIdx.x);
  const int lane = threadIdx.x % 32;
  const int64_t first = pieces_per_mask.remainder(blockIdx.x) * kTokensPerCta + threadIdx.x / 32 * 1024;  // of the warp
  const int64_t num_left = p.vocab_size - first - lane * 32;  // from this lane's first token on
  const int32_t row_idx = p.rows[mask_idx];
  uint32_t own_word = 0xffffffffu;
  if (num_left > 0) own_word = static_cast<uint32_t>(p.bitmask[mask_idx * p.bitmask_stride + first / 32 + lane]);
  if (num_left > 0 && num_left < 32) own_word |= 0xffffffffu << num_left;
  if (row_idx < 0 || row_idx >= p.num_rows) return;
  float* const logits = p.logits + row_idx * p.logits_stride + first;
#pragma unroll 8
  for (int i = 0; i < 32; ++i) {
    const uint32_t word = __shfl_sync(0xffffffffu, own_word, i);
    if ((word >> lane & 1u) != 0) continue;
    if (word != 0) prefetch_l2(logits + i * 32 + lane);
    logits[i * 32 + lane] = -INFINITY;
  }
}

}  // namespace

cudaError_t apply_token_bitmask(const ApplyTokenBitmaskParams& p, cudaStream_t stream) {
  const int64_t pieces = (p.vocab_size + kTokensPerCta - 1) / kTokensPerCta;
  if (pieces > INT32_MAX || p.num_masks > INT32_MAX / pieces) return cudaErrorInvalidConfiguration;
  return launch_kernel_behind(apply_token_bitmask_kernel, p.num_masks * pieces, kBitmaskThreads, 0, stream, p,
                              FastDivide(static_cast<int32_t>(pieces)));
}

}  // namespace fastattn
