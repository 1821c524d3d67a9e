// Tiles of 4-bit weights whose columns are in order 16 (gemm_sm90_w4_tiled_operands.cuh) on their way to bf16 or fp16:
// a type for each format. Of the four pairs of a word, numbers are as in gemm_sm90_w4_formats.cuh.
//
// Each type has
//   T               what weights become
//   kSumFactor      by which sums of the products are too small
//   Row, row        where memory has the scales of a lane's two rows of a row of tiles
//   Raw, load       what it has of them for a tile
//   kWords, of      words that a lane makes of that: T in the low half for the upper row, in the high half for the
//   lower make_fragment   of 16 columns, the tile's `product`-th
#pragma once

#include "gemm/gemm_sm90_w4_formats.cuh"

namespace fastattn {

constexpr int kW4TileRows = 16, kW4TileK = 64, kW4TileBytes = 512;

// Of FP4's scales those of a lane's two rows in all tiles of a row of tiles.
template <typename Raw>
__device__ __forceinline__ const Raw* fp4_scales(const GemmSm90W4Params& p, int32_t row_tile, int lane) {
  return static_cast<const Raw*>(p.weight_scale) + int64_t{row_tile} * (p.k / kW4TileK) * 8 + lane / 4;
}

// The codes of a word as numbers times 2^-126 (bf16) or 2^-14 (fp16). Three pairs of sign and number seven bits apart
// can lie in a word side by side; two of the four here are sums of two places each, so that each takes a shift or two,
// one of them shared, and a logic operation.
template <typename T>
__device__ __forceinline__ void small_e2m1_pairs(uint32_t (&pairs)[4], uint32_t word) {
  constexpr uint32_t kPair = 0x81c081c0u, kNumber = 0x01c001c0u;
  const uint32_t shifted = word << 2;
  pairs[0] = word & kPair;
  pairs[1] = (word << 12 | word >> 20) & kPair;  // a rotation, which is one instruction
  pairs[2] = (shifted ^ word << 6) & kPair;
  pairs[3] = (shifted ^ (word << 8 | word >> 24)) & kPair;
  if constexpr (kIsHalf<T>) {
#pragma unroll
    for (uint32_t& pair : pairs) pair += (pair & kNumber) * 7;  // three bits up, but for the sign
  }
}

template <typename T>
__device__ __forceinline__ void multiply_pairs(uint32_t (&pairs)[4], uint32_t scales) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Pair<T> scale = i % 2 == 0 ? half_of<0, T>(scales) : half_of<1, T>(scales);
    pairs[i] = bits_of<T>(__hmul2(as_pair<T>(pairs[i]), scale));
  }
}

template <typename Element>
struct Nvfp4Tiles {
  using T = Element;
  using Row = const uint2*;
  using Raw = uint2;
  static constexpr float kSumFactor = Nvfp4Sm90<T>::kSumFactor;
  static constexpr int kWords = 4;

  __device__ static __forceinline__ Row row(const GemmSm90W4Params& p, int32_t row_tile, int lane) {
    return fp4_scales<Raw>(p, row_tile, lane);
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params&, const Row& row, int32_t tile) {
    return __ldg(row + tile * 8);
  }
  __device__ static __forceinline__ void of(uint32_t (&words)[kWords], const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Nvfp4Sm90<T>::of(raw.x, raw.y, i);
  }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t codes, int product,
                                                       const uint32_t (&words)[kWords]) {
    small_e2m1_pairs<T>(a, codes);
    multiply_pairs<T>(a, words[product]);
  }
};

// Scales are relative to their row's largest, at most 2^6, so that they can take a factor along as NVFP4's do: in fp16
// as large a one as there can be, with which weights are exact down to 0.5 * 2^-18.
template <typename Element>
struct Mxfp4Tiles {
  using T = Element;
  using Row = const uint32_t*;
  using Raw = uint32_t;
  static constexpr float kSumFactor = kIsHalf<T> ? 0x1p5f : 0x1p7f;
  static constexpr float kScaleFactor = kIsHalf<T> ? 0x1p9f : 0x1p119f;
  static constexpr int kWords = 2;

  __device__ static __forceinline__ Row row(const GemmSm90W4Params& p, int32_t row_tile, int lane) {
    return fp4_scales<Raw>(p, row_tile, lane);
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params&, const Row& row, int32_t tile) {
    return __ldg(row + tile * 8);
  }
  __device__ static __forceinline__ void of(uint32_t (&words)[kWords], const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float low = from_e8m0<float>(static_cast<uint8_t>(raw >> 8 * i));
      const float high = from_e8m0<float>(static_cast<uint8_t>(raw >> (16 + 8 * i)));
      words[i] = pack_pair<T>(low * kScaleFactor, high * kScaleFactor);
    }
  }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t codes, int product,
                                                       const uint32_t (&words)[kWords]) {
    small_e2m1_pairs<T>(a, codes);
    multiply_pairs<T>(a, words[product / 2]);
  }
};

// Scales lie as checkpoints have them. Pair i of a word is in bits 4 i to 4 i + 3 of either half.
template <typename Element>
struct Int4Tiles {
  using T = Element;
  using Numbers = Int4Sm90<T>;
  using Row = int32_t;
  struct Raw {
    typename Numbers::Raw low, high;
  };
  static constexpr float kSumFactor = 1.0f;
  static constexpr int kWords = 2;

  __device__ static __forceinline__ Row row(const GemmSm90W4Params&, int32_t row_tile, int lane) {
    return row_tile * kW4TileRows + lane / 4;
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, const Row& row, int32_t tile) {
    return {Numbers::load(p, row, tile * kW4TileK), Numbers::load(p, row + 8, tile * kW4TileK)};
  }
  __device__ static __forceinline__ void of(uint32_t (&words)[kWords], const Raw& raw) {
    const typename Numbers::Scales scales = Numbers::of(raw.low, raw.high, 0);
    words[0] = scales.scale;
    words[1] = scales.zero;
  }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t codes, int,
                                                       const uint32_t (&words)[kWords]) {
    const uint32_t places[4] = {codes << 4, codes, codes >> 4, codes >> 8};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const typename Numbers::Scales scales = {words[0], words[1]};
      a[i] = bits_of<T>(i % 2 == 0 ? Numbers::template number<0>(places[i] & 0x00f000f0u, scales)
                                   : Numbers::template number<1>(places[i] & 0x00f000f0u, scales));
    }
  }
};

}  // namespace fastattn
