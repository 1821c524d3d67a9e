// Forbids tokens by a bit each.
//
//   logits[rows[r], t] = -inf     where bit t % 32 of bitmask[r, t / 32] is 0
//
// A warp takes 32 tokens at a time: all its lanes read one word, each looks at its own bit, and those that find 0
// write. Logits are never read, and what is allowed is not written: a mask that allows little writes V * 4 bytes, one
// that allows much only itself is read. CTAs of a mask lie along x, masks along y.
#include <cmath>

#include "sampling/apply_token_bitmask.h"

namespace fastattn {
namespace {

constexpr int kNumThreads = 256;
constexpr int kTokensPerThread = 8;
constexpr unsigned kMaxGridY = 65535;

__global__ void __launch_bounds__(kNumThreads)
    apply_token_bitmask_kernel(const __grid_constant__ ApplyTokenBitmaskParams p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kNumThreads * kTokensPerThread + threadIdx.x;
  for (int64_t mask_idx = blockIdx.y; mask_idx < p.num_masks; mask_idx += gridDim.y) {
    const int32_t row_idx = p.rows[mask_idx];
    if (row_idx < 0 || row_idx >= p.num_rows) continue;
    const int32_t* const words = p.bitmask + mask_idx * p.bitmask_stride;
    float* const logits = p.logits + row_idx * p.logits_stride;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int64_t token = first + i * kNumThreads;
      if (token >= p.vocab_size) break;
      const uint32_t word = static_cast<uint32_t>(words[token / 32]);
      if ((word >> (token % 32) & 1u) == 0) logits[token] = -INFINITY;
    }
  }
}

}  // namespace

cudaError_t apply_token_bitmask(const ApplyTokenBitmaskParams& p, cudaStream_t stream) {
  constexpr int64_t kTokensPerCta = kNumThreads * kTokensPerThread;
  const int64_t num_ctas = (p.vocab_size + kTokensPerCta - 1) / kTokensPerCta;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const unsigned grid_y = p.num_masks < kMaxGridY ? static_cast<unsigned>(p.num_masks) : kMaxGridY;
  apply_token_bitmask_kernel<<<dim3(static_cast<unsigned>(num_ctas), grid_y), kNumThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fastattn
