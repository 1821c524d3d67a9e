// Weights of 4 bits in tiles on their way to A fragments: a type for each format, an object of which has the scales of
// a tile. Numbers are those of gemm_sm90_w4_16_bit_tiles.cuh, to the bit.
//
// Each type has
//   X, T, Out       of x, of the fragments, of out and bias
//   kFours          whether a lane's columns of a word are four neighbours, as tiles in order 8 have them, or two pairs
//   kTileBytes      scales of a tile, which come with its codes: an eighth of them for each two rows, 8 apart
//   kSumFactor      by which sums of the products are too small
//   Step            scales where none do: of the tiles that a warp multiplies at a time, ROW_TILES times STAGE_TILES,
//                   loaded a step ahead
//   make_fragment   of a word of codes, columns 16 j to 16 j + 15 of the tile
#pragma once

#include "arch/byte_permute.cuh"
#include "arch/e4m3.cuh"
#include "gemm/gemm_sm90_w4_16_bit_tiles.cuh"

namespace fastattn {

// Where all scales come with the codes.
template <int ROW_TILES, int STAGE_TILES>
struct NoStepScales {};

// NVFP4 in groups of 16 columns, MXFP4 of 32.
template <typename Element, int GROUP>
struct Fp4Tile {
  static_assert(GROUP == 16 || GROUP == 32);
  using X = Element;
  using T = Element;
  using Out = Element;
  template <int ROW_TILES, int STAGE_TILES>
  using Step = NoStepScales<ROW_TILES, STAGE_TILES>;
  static constexpr bool kFours = false;
  static constexpr int kTileBytes = 16 * 64 / GROUP;
  static constexpr float kSumFactor = GROUP == 16 ? Nvfp4Tiles<T>::kSumFactor : Mxfp4Tiles<T>::kSumFactor;

  Fp4Tile() = default;
  // Lane 4 g + t makes those of the t-th group of rows g and g + 8. `scales`: the upper row's, then the lower's.
  template <typename Steps>
  __device__ __forceinline__ Fp4Tile(const Steps&, const unsigned char* scales, int, int, int lane) {
    constexpr float kFactor = GROUP == 16 ? Nvfp4Sm90<T>::kScaleFactor : Mxfp4Tiles<T>::kScaleFactor;
    if constexpr (GROUP == 16) {
      const uint2 all = *reinterpret_cast<const uint2*>(scales);
      uint32_t halves[2];
      unpack_e4m3(halves, __byte_perm(all.x, all.y, lane % 4 * 0x11u + 0x40u));
      if constexpr (kIsHalf<T>) {
        own_ = bits_of<T>(__hmul2(as_pair<T>(halves[0]), both<T>(T(kFactor))));
      } else {
        const float2 two = unpack_pair<__half>(halves[0]);
        own_ = pack_pair<T>(two.x * kFactor, two.y * kFactor);
      }
    } else {
      const uint32_t all = *reinterpret_cast<const uint32_t*>(scales) >> lane % 2 * 8;
      own_ = pack_pair<T>(from_e8m0<float>(static_cast<uint8_t>(all)) * kFactor,
                          from_e8m0<float>(static_cast<uint8_t>(all >> 16)) * kFactor);
    }
  }
  __device__ __forceinline__ uint32_t scales_of(int j, int lane) const {
    return __shfl_sync(0xffffffffu, own_, (lane & 28) | j * 16 / GROUP);
  }
  __device__ __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t word, int j, int lane) const {
    const uint32_t scales = scales_of(j, lane);
    small_e2m1_pairs<T>(a, word);
    multiply_pairs<T>(a, scales);
  }

 private:
  uint32_t own_;
};

// INT4's codes lie in a word as nibbles: those of the upper row in the lower half of a byte, so that with the rest cut
// off they are code * 2^-133 in bf16, and of the lower row in the upper half, code * 2^-129; in fp16 they are bits of
// the mantissas of 1024 and 64. The difference to the zero point is exact, the product with the scale rounds once. In
// bf16 the scale must be below 2^122.
template <typename Element>
struct Int4Tile {
  using X = Element;
  using T = Element;
  using Out = Element;
  static constexpr bool kFours = false;
  static constexpr int kTileBytes = 0;
  static constexpr float kSumFactor = 1.0f;

  // The four lanes of a row have a tile's each, and the next four's.
  template <int ROW_TILES, int STAGE_TILES>
  struct Step {
    static constexpr int kOwn = (STAGE_TILES + 3) / 4;
    static_assert(kOwn <= 2);
    uint32_t next_scale[ROW_TILES][kOwn][2];
    int32_t next_zero[ROW_TILES][kOwn][2];
    uint32_t scale[ROW_TILES][kOwn], zero[ROW_TILES][kOwn];

    // Of tiles from these on; past the last one, or the last row, stands that one.
    __device__ __forceinline__ void load(const GemmSm90W4Params& p, int32_t row_tile, int32_t column_tile, int lane) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const int64_t row = min(row_tile + r, static_cast<int32_t>(p.n / 16) - 1) * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const int32_t tile = min(column_tile + 4 * i + lane % 4, static_cast<int32_t>(p.k / 64) - 1);
          const int64_t group = p.group_size.divide(tile * 64);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int64_t its_row = row + half * 8;
            next_scale[r][i][half] =
                __ldg(static_cast<const uint16_t*>(p.weight_scale) + its_row * p.scale_stride + group);
            next_zero[r][i][half] =
                p.zero_point == nullptr ? 0 : __ldg(p.zero_point + its_row * p.zero_point_stride + group);
          }
        }
      }
    }
    __device__ __forceinline__ void take() {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const uint32_t scales = next_scale[r][i][0] | next_scale[r][i][1] << 16;
          const float zeros[2] = {8.0f + static_cast<float>(next_zero[r][i][0]),
                                  8.0f + static_cast<float>(next_zero[r][i][1])};
          if constexpr (kIsHalf<T>) {
            scale[r][i] = scales;
            zero[r][i] = pack_pair<T>(1024.0f + zeros[0], 64.0f + zeros[1]);
          } else {
            const float2 two = unpack_pair<T>(scales);
            scale[r][i] = pack_pair<T>(64.0f * two.x, 4.0f * two.y);
            zero[r][i] = pack_pair<T>(zeros[0] / -64.0f, zeros[1] / -4.0f);
          }
        }
      }
    }
  };

  template <typename Steps>
  __device__ __forceinline__ Int4Tile(const Steps& steps, const unsigned char*, int row_tile, int tile, int lane) {
    // Which of two only the loop knows; an index would put them into memory.
    const uint32_t first = tile < 4 ? ~0u : 0u;
    const uint32_t scale = steps.scale[row_tile][0] & first | steps.scale[row_tile][Steps::kOwn - 1] & ~first;
    const uint32_t zero = steps.zero[row_tile][0] & first | steps.zero[row_tile][Steps::kOwn - 1] & ~first;
    scale_ = __shfl_sync(0xffffffffu, scale, (lane & 28) | tile % 4);
    zero_ = __shfl_sync(0xffffffffu, zero, (lane & 28) | tile % 4);
  }
  __device__ __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t word, int, int) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t codes = (i < 2 ? word : word >> 8) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
      const Pair<T> scale = i % 2 == 0 ? half_of<0, T>(scale_) : half_of<1, T>(scale_);
      const Pair<T> zero = i % 2 == 0 ? half_of<0, T>(zero_) : half_of<1, T>(zero_);
      if constexpr (kIsHalf<T>) {
        a[i] = bits_of<T>(__hmul2(__hsub2(as_pair<T>(codes | (i % 2 == 0 ? 0x64006400u : 0x54005400u)), zero), scale));
      } else {
        a[i] = bits_of<T>(__hmul2(__hfma2(as_pair<T>(codes), as_pair<T>(0x7f007f00u), zero), scale));
      }
    }
  }

 private:
  uint32_t scale_, zero_;
};

// Tiles in order 8, which are for x in e4m3, with x in 16 bits all the same. Magnitudes are what byte permutes look up:
// fp16's upper bytes of 0, 0.5 ... 6, times 2^-14, and of bf16, times 2^-126, upper and lower ones.
template <typename Element, int GROUP>
struct Fp4TileOfFours : Fp4Tile<Element, GROUP> {
  using Base = Fp4Tile<Element, GROUP>;
  using T = Element;
  static constexpr bool kFours = true;

  using Base::Base;

  __device__ __forceinline__ void make_fragment(uint32_t (&a)[4], uint32_t word, int j, int lane) const {
    const uint2 upper_bytes = kIsHalf<T> ? uint2{0x06040200u, 0x0e0c0a08u} : uint2{0x00000000u, 0x01010101u};
    const uint32_t selectors = word & 0x77777777u, of_second = selectors >> 16;
    const uint32_t first = look_up_bytes(upper_bytes, selectors) | (word & 0x80808080u);
    const uint32_t second = look_up_bytes(upper_bytes, of_second) | (word << 4 & 0x80808080u);
    if constexpr (kIsHalf<T>) {
      a[0] = __byte_perm(first, 0, 0x1404);
      a[1] = __byte_perm(second, 0, 0x1404);
      a[2] = __byte_perm(first, 0, 0x3424);
      a[3] = __byte_perm(second, 0, 0x3424);
    } else {
      const uint2 lower_bytes = {0xc0804000u, 0xc0804000u};
      const uint32_t lower_of_first = look_up_bytes(lower_bytes, selectors);
      const uint32_t lower_of_second = look_up_bytes(lower_bytes, of_second);
      a[0] = __byte_perm(first, lower_of_first, 0x1504);
      a[1] = __byte_perm(second, lower_of_second, 0x1504);
      a[2] = __byte_perm(first, lower_of_first, 0x3726);
      a[3] = __byte_perm(second, lower_of_second, 0x3726);
    }
    multiply_pairs<T>(a, Base::scales_of(j, lane));
  }
};

// With x in e4m3 and products in fp16, which holds x, E2M1 times a scale, and so every weight, exactly: more than the
// kernel for many rows, of which NVFP4's weights are rounded to e4m3. x is put in the order of the weight's columns: of
// each four of 16 the first two, then the others.
template <typename OutElement, int GROUP>
struct Fp4TileOfFp8 : Fp4TileOfFours<__half, GROUP> {
  using X = __nv_fp8_e4m3;
  using Out = OutElement;
  static constexpr bool kFours = false;

  using Fp4TileOfFours<__half, GROUP>::Fp4TileOfFours;

  __device__ static __forceinline__ void widen(uint4 (&halves)[2], const uint4& x) {
    uint32_t pairs[4][2];
    unpack_e4m3(pairs[0], x.x);
    unpack_e4m3(pairs[1], x.y);
    unpack_e4m3(pairs[2], x.z);
    unpack_e4m3(pairs[3], x.w);
    halves[0] = {pairs[0][0], pairs[1][0], pairs[2][0], pairs[3][0]};
    halves[1] = {pairs[0][1], pairs[1][1], pairs[2][1], pairs[3][1]};
  }
};

}  // namespace fastattn
