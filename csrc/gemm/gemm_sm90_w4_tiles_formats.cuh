// Weights of 4 bits in tiles on their way to A fragments: a type for each format, an object of which has the scales of
// a tile. Numbers are those of gemm_sm90_w4_formats.cuh, to the bit.
//
// Each type has
//   T               of x and of the fragments
//   kTileBytes      scales of a tile
//   kSumFactor      by which sums of the products are too small
//   make_fragment   of a word of codes, columns 16 j to 16 j + 15 of the tile
#pragma once

#include "arch/e4m3.cuh"
#include "gemm/gemm_sm90_w4_formats.cuh"

namespace fastattn {

__device__ __forceinline__ uint32_t rotate_left(uint32_t word, int num_bits) {
  return word << num_bits | word >> (32 - num_bits);
}

// A word's codes as the four registers of a fragment: sign, exponent and mantissa where T has its own, which is the
// number times 2^-126 (bf16) or 2^-14 (fp16). Of bf16, signs are seven bits above their numbers, and three pairs are
// all that can lie so in a word; with two of them in sums of bits, four can.
template <typename T>
__device__ __forceinline__ void small_e2m1_pairs(uint32_t (&pairs)[4], uint32_t word) {
  constexpr uint32_t kPair = 0x81c081c0u, kNumber = 0x01c001c0u;
  const uint32_t shifted = word << 2;
  pairs[0] = word & kPair;
  pairs[1] = rotate_left(word, 12) & kPair;
  pairs[2] = (shifted ^ word << 6) & kPair;
  pairs[3] = (shifted ^ rotate_left(word, 8)) & kPair;
  if constexpr (kIsHalf<T>) {
    // Three bits up, and the sign stays where it is.
#pragma unroll
    for (uint32_t& pair : pairs) pair += (pair & kNumber) * 7;
  }
}

template <typename Element>
struct Nvfp4Tile {
  using T = Element;
  static constexpr int kTileBytes = 64;
  static constexpr float kSumFactor = Nvfp4Sm90<T>::kSumFactor;

  // Columns 16 (lane % 4) and on: lane / 4 has four scales of the upper row, then of the lower one.
  __device__ __forceinline__ Nvfp4Tile(const unsigned char* scales, int lane) {
    const uint2 all = *reinterpret_cast<const uint2*>(scales + lane / 4 * 8);
    uint32_t halves[2];
    unpack_e4m3(halves, __byte_perm(all.x, all.y, lane % 4 * 0x11u + 0x40u));
    if constexpr (kIsHalf<T>) {
      own_ = bits_of<T>(__hmul2(as_pair<T>(halves[0]), as_pair<T>(0x58005800u)));
    } else {
      const float2 two = unpack_pair<__half>(halves[0]);
      own_ = pack_pair<T>(two.x * Nvfp4Sm90<T>::kScaleFactor, two.y * Nvfp4Sm90<T>::kScaleFactor);
    }
  }
  __device__ __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t word, int j, int lane) const {
    const uint32_t scales = __shfl_sync(0xffffffffu, own_, (lane & 28) | j);
    small_e2m1_pairs<T>(a, word);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair<T> scale = i % 2 == 0 ? half_of<0, T>(scales) : half_of<1, T>(scales);
      a[i] = bits_of<T>(__hmul2(as_pair<T>(a[i]), scale));
    }
  }

 private:
  uint32_t own_;
};

template <typename Element>
struct Mxfp4Tile {
  using T = Element;
  static constexpr int kTileBytes = 32;
  static constexpr float kSumFactor = 1.0f;

  // Columns 32 (lane % 2) and on.
  __device__ __forceinline__ Mxfp4Tile(const unsigned char* scales, int lane) {
    const uint32_t all = *reinterpret_cast<const uint32_t*>(scales + lane / 4 * 4) >> lane % 2 * 8;
    own_ = pack_pair<T>(from_e8m0<float>(static_cast<uint8_t>(all)), from_e8m0<float>(static_cast<uint8_t>(all >> 16)));
  }
  __device__ __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t word, int j, int lane) const {
    const uint32_t scales = __shfl_sync(0xffffffffu, own_, (lane & 28) | j / 2);
    small_e2m1_pairs<T>(a, word);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair<T> scale = i % 2 == 0 ? half_of<0, T>(scales) : half_of<1, T>(scales);
      a[i] = bits_of<T>(__hmul2(__hmul2(as_pair<T>(a[i]), as_pair<T>(Mxfp4Sm90<T>::kFactor)), scale));
    }
  }

 private:
  uint32_t own_;
};

}  // namespace fastattn
