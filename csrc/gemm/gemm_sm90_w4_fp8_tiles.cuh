// Tiles of FP4 weights whose columns are in order 8 (gemm_sm90_w4_tiled_operands.cuh) on their way to e4m3, for
// products with x in e4m3: what a lane makes of a word, which is eight weights, and of a scale.
//
//   NVFP4   e4m3(E2M1 * scale / 8)              a row's sums are multiplied by x_scale * 8 / global_scale
//   MXFP4   e4m3(E2M1 * 2^(scale - 127))                                       x_scale / global_scale
//
// MXFP4's scales come relative to their row's largest, which is at most 2^6, so that 6 * 2^6 fits; the rest is in
// global_scale. Exact down to 2^-8, fourteen powers of two below. NVFP4's are at most 448, and 6 * 448 / 8 fits. The
// product with the scale is exact in fp16, so that a weight rounds once.
#pragma once

#include "arch/byte_permute.cuh"
#include "arch/e2m1.cuh"
#include "arch/e4m3.cuh"
#include "arch/shared_memory.cuh"

namespace fastattn {

// Of each scale there can be, by its byte, the magnitudes 0, 0.5, 1, 1.5 and 2, 3, 4, 6 times the scale: a byte each.
// To look them up costs a lane less than to make them.
template <int GROUP>
struct ScaledMagnitudes {
  static_assert(GROUP == 16 || GROUP == 32);
  static constexpr float kSumFactor = GROUP == 16 ? 8.0f : 1.0f;
  uint2 of[256];

  // By all threads of a CTA; a barrier must follow.
  __device__ __forceinline__ void fill() {
    for (int bits = static_cast<int>(threadIdx.x); bits < 256; bits += static_cast<int>(blockDim.x)) {
      // Below fp16's normal numbers nothing is left of a power of two in e4m3.
      const uint32_t power = bits == 255 ? 0x7e00u : static_cast<uint32_t>(max(bits - 127 + 15, 0)) << 10;
      const __half scale = GROUP == 16 ? __hmul(from_e4m3<__half>(static_cast<uint8_t>(bits)), __float2half(0.125f))
                                       : as_pair<__half>(power & 0xffffu).x;
      const Pair<__half> two = both<__half>(scale);
      const auto times = [&](uint32_t pair) { return bits_of<__half>(__hmul2(two, as_pair<__half>(pair))); };
      of[bits] = {pack_e4m3_pairs(times(0x38000000u), times(0x3e003c00u)),
                  pack_e4m3_pairs(times(0x42004000u), times(0x46004400u))};
    }
  }
};

// The eight weights of a word, four of either row, of scales that are byte `idx` of words. `magnitudes`: where the
// table begins in shared memory. Magnitudes of codes are a byte permute's selector, the lower and the upper half of the
// word; signs are the upper bits of bytes (first row) and of their lower halves (second).
__device__ __forceinline__ void make_fp8_weights(uint32_t& first, uint32_t& second, uint32_t codes, uint32_t magnitudes,
                                                 uint32_t first_scales, int first_idx, uint32_t second_scales,
                                                 int second_idx) {
  const uint2 of_first = load_shared_8_bytes(address_of_eight(magnitudes, first_scales, first_idx));
  const uint2 of_second = load_shared_8_bytes(address_of_eight(magnitudes, second_scales, second_idx));
  const uint32_t selectors = codes & 0x77777777u;
  first = look_up_bytes(of_first, selectors) ^ (codes & 0x80808080u);
  second = look_up_bytes(of_second, selectors >> 16) ^ (codes << 4 & 0x80808080u);
}

}  // namespace fastattn
