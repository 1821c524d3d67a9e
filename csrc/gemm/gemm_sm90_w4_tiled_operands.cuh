// Weights of 4 bits in tiles, on their way to wgmma's left operand: what the Hopper GEMM for many rows multiplies.
//
// A tile is 16 rows x 64 columns of codes, 512 bytes: 16 of each lane of a warp, lane 4 g + t having what A's fragments
// give it, of rows g and g + 8. So a lane takes 16 bytes by one load, and no code is moved to another place. A word of
// them is, with columns in
//   order 16, x in 16 bits   the fragment of 16 columns: 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of both rows
//   order 8, x in 8 bits     half of that of 32: four columns of both rows, from 4 t (even words) or 16 + 4 t on
// (the bits in it: gemm_sm90_w4_16_bit_tiles.cuh, gemm_sm90_w4_fp8_tiles.cuh; fastattn/reference/w4_tiles.py).
// FP4's scales lie in the same order, those of a tile's row g and then of row g + 8 together.
//
//   kind                      x      A fragment                          sums are multiplied by
//   GemmSm90W4TilesA16<F>     T      T, as the format F has it           kSumFactor / global_scale
//   GemmSm90W4TilesA8         e4m3   e4m3(E2M1 * scale * constant)       x_scale * kSumFactor / global_scale
//
// Each type has
//   Element, Out    the elements of x, of out and bias
//   kDType          the former's
//   kTwoLevels      the tensor cores add up 128 columns, registers the rest (gemm_sm90_operands.cuh)
//   Shared          what a CTA keeps in shared memory for it, made by `fill` (a barrier must follow); its address is
//   the
//                   last argument of make_fragment
//   Row, row        where memory has the scales of a lane's two rows of a row of tiles
//   Raw, load       what it has of them for a tile
//   kWords, of      what a lane makes of that, and the four lanes of a row hand to each other: words
//   make_fragment   of product `product` of a tile, from the lane's codes and those words
//   x_scale         of a row of x
//   column_factor   of a row of weight: what its sums are multiplied by
#pragma once

#include "arch/dtype.h"
#include "arch/mbarrier.cuh"
#include "arch/wgmma.cuh"
#include "gemm/gemm_sm90_operands.cuh"
#include "gemm/gemm_sm90_w4_16_bit_tiles.cuh"
#include "gemm/gemm_sm90_w4_fp8_tiles.cuh"

namespace fastattn {

template <typename FormatOfWeight>
struct GemmSm90W4TilesA16 {
  using Format = FormatOfWeight;
  using Element = typename Format::T;
  using Out = Element;
  using Row = typename Format::Row;
  using Raw = typename Format::Raw;
  static constexpr DType kDType = GemmSm90Dense<Element>::kDType;
  static constexpr bool kTwoLevels = false;
  static constexpr int kWords = Format::kWords;
  struct Shared {
    __device__ __forceinline__ void fill() {}
  };

  __device__ static __forceinline__ Row row(const GemmSm90W4Params& p, int32_t row_tile, int lane) {
    return Format::row(p, row_tile, lane);
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, const Row& row, int32_t tile) {
    return Format::load(p, row, tile);
  }
  __device__ static __forceinline__ void of(uint32_t (&words)[kWords], const Raw& raw) { Format::of(words, raw); }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], const uint32_t (&codes)[4], int product,
                                                       const uint32_t (&words)[kWords], uint32_t) {
    Format::make_fragment(a, codes[product], product, words);
  }

  __device__ static __forceinline__ float x_scale(const GemmSm90W4Params&, int64_t) { return 1.0f; }
  __device__ static __forceinline__ float column_factor(const GemmSm90W4Params& p, int64_t row) {
    return p.global_scale == nullptr ? Format::kSumFactor : Format::kSumFactor / __ldg(p.global_scale + row);
  }
};

// With x in e4m3. GROUP: 16 is NVFP4, 32 is MXFP4.
template <typename T, int GROUP, bool FAST_ACCUM>
struct GemmSm90W4TilesA8 {
  using Element = __nv_fp8_e4m3;
  using Out = T;
  using Shared = ScaledMagnitudes<GROUP>;
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr bool kTwoLevels = !FAST_ACCUM;
  static constexpr int kWords = 32 / GROUP;
  using Raw = std::conditional_t<GROUP == 16, uint2, uint32_t>;

  using Row = const Raw*;

  __device__ static __forceinline__ Row row(const GemmSm90W4Params& p, int32_t row_tile, int lane) {
    return fp4_scales<Raw>(p, row_tile, lane);
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params&, const Row& row, int32_t tile) {
    return __ldg(row + tile * 8);
  }
  __device__ static __forceinline__ void of(uint32_t (&words)[kWords], const Raw& raw) {
    if constexpr (GROUP == 16) {
      words[0] = raw.x;
      words[1] = raw.y;
    } else {
      words[0] = raw;
    }
  }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], const uint32_t (&codes)[4], int product,
                                                       const uint32_t (&words)[kWords], uint32_t magnitudes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int word = 2 * product + i, span = word * 16 / GROUP;
      make_fp8_weights(a[2 * i], a[2 * i + 1], codes[word], magnitudes, words[0], span, words[kWords - 1],
                       GROUP == 16 ? span : 2 + span);
    }
  }

  __device__ static __forceinline__ float x_scale(const GemmSm90W4Params& p, int64_t row) {
    return p.x_scale[row * p.x_scale_stride];
  }
  __device__ static __forceinline__ float column_factor(const GemmSm90W4Params& p, int64_t row) {
    return p.global_scale == nullptr ? Shared::kSumFactor : Shared::kSumFactor / __ldg(p.global_scale + row);
  }
};

// What the four lanes of a row have in turns: each loads the scales of one of a stage's four tiles, one stage ahead,
// and makes words of them.
template <typename Operands>
struct GemmSm90W4TileScales {
  static constexpr int kWords = Operands::kWords;
  typename Operands::Row row;
  typename Operands::Raw next;
  uint32_t own[kWords];

  // Rows first_n to first_n + 15. The last ones that there are, and the last columns, stand in for those past the ends:
  // x is zero there, or the result is not stored.
  __device__ __forceinline__ void begin(const GemmSm90W4Params& p, int32_t first_n, int lane) {
    row = Operands::row(p, min(first_n, static_cast<int32_t>(p.n) - 1) / kW4TileRows, lane);
  }
  __device__ __forceinline__ void load(const GemmSm90W4Params& p, int32_t step, int lane) {
    const int32_t tile = step * (kGemmSm90W4StageK / kW4TileK) + lane % 4;
    next = Operands::load(p, row, min(tile, static_cast<int32_t>(p.k) / kW4TileK - 1));
  }
  __device__ __forceinline__ void take() { Operands::of(own, next); }
  __device__ __forceinline__ void hand_out(uint32_t (&words)[kWords], int tile, int lane) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(0xffffffffu, own[i], (lane & 28) | tile);
  }
};

// acc (64, BLOCK_M) += the products of a panel of x, 128 bytes a row, and the weight, in two sets of two fragments that
// live from one panel to the next. `codes_of_lane`: where the lane's codes of the panel's first tile lie; first_tile:
// of the stage.
//
//   step i of 2: wait for the products of step i - 2 │ released(i) │ A fragments in their place │ products of i
//                ◄────────────────────── the products of i - 1 run ──────────────────────►
//
// A step has two products, 64 bytes of a row of x. released(i): what the products up to i - 2 have read is free.
// is_first: acc has nothing yet. Sums in two levels are of a panel, and added up when its products are over.
template <typename Operands, int BLOCK_M, typename Released>
__device__ __forceinline__ void multiply_w4_panel(float (&acc)[BLOCK_M / 8][4], uint32_t (&a)[2][2][4],
                                                  uint32_t codes_of_lane, const GemmSm90W4TileScales<Operands>& scales,
                                                  int first_tile, uint32_t shared, WgmmaDescriptor x, bool is_first,
                                                  int lane, Released released) {
  using Product = Wgmma<typename Operands::Element, BLOCK_M>;
  constexpr int TILES = 128 / sizeof(typename Operands::Element) / kW4TileK, PRODUCTS = 4 / TILES;  // of a tile
  uint32_t codes[TILES][4], words[TILES][Operands::kWords];
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    const uint4 loaded = load_shared_16_bytes(codes_of_lane + t * kW4TileBytes);
    codes[t][0] = loaded.x;
    codes[t][1] = loaded.y;
    codes[t][2] = loaded.z;
    codes[t][3] = loaded.w;
    scales.hand_out(words[t], first_tile + t, lane);
  }
  float part[Operands::kTwoLevels ? BLOCK_M / 8 : 1][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    wgmma_wait<1>();
    pin_registers(a[i]);
    released(i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int product = 2 * i + j, tile = product / PRODUCTS;
      Operands::make_fragment(a[i][j], codes[tile], product % PRODUCTS, words[tile], shared);
    }
    wgmma_fence();
    if constexpr (Operands::kTwoLevels) {
      Product::rs_k(part, a[i][0], x.plus(i * 64), i);
      Product::rs_k(part, a[i][1], x.plus(i * 64 + 32), 1);
    } else {
      Product::rs_k(acc, a[i][0], x.plus(i * 64), i > 0 || !is_first);
      Product::rs_k(acc, a[i][1], x.plus(i * 64 + 32), 1);
    }
    wgmma_commit();
  }
  if constexpr (Operands::kTwoLevels) {
    wgmma_wait<0>();
    pin_registers(part);
#pragma unroll
    for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[t][j] = is_first ? part[t][j] : acc[t][j] + part[t][j];
    }
  }
}

}  // namespace fastattn
