// Philox4x32-10, the counter-based generator of Random123 (https://doi.org/10.1145/2063384.2063405): no state to keep,
// so a seed and a position always give the same number, whatever the batch.
#pragma once

#include <cstdint>

namespace fastattn {

// The four words for the 64-bit key `seed` and the counter `position`, whose upper 64 bits are c2 and c3.
__device__ __forceinline__ uint4 philox_words(uint64_t seed, uint64_t position, uint32_t c2 = 0, uint32_t c3 = 0) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ uint32_t philox_first_word(uint64_t seed, uint64_t position) {
  return philox_words(seed, position).x;
}

}  // namespace fastattn
