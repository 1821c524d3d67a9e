// Scales of sums in two levels, a panel of K (128 columns of e4m3) at a time: what a panel's sums are multiplied by
// when registers add them up.
//
//   x_scale (⌈K / 128⌉, M)   of 128 columns of a row of x        weight_scale (⌈N / 128⌉, ⌈K / 128⌉)   of 128 x 128
//
//   of many rows   a thread's sums are of two rows of x; a part of its columns, 128, has one scale of weight
//   of few rows    they are of two columns in eight, which are rows of x; its rows of weight have one scale
//
// Of many rows, a panel's scales are asked for before the products of the one before. Few rows have more of them and
// wait for memory in any case: theirs come while they do, or while products run.
//
// Each type has
//   ask    for those of the part that begins at row `row` of B, before its products
//   take   makes factors of them when products have ended; LAST: of a panel
//   add    acc += part * factor
#pragma once

#include <cstdint>

#include "gemm/gemm_sm90.h"

namespace fastattn {

constexpr int kGemmSm90ScaleBlock = 128;  // rows and columns that share a scale

// Sums are added up as they are.
struct GemmSm90NoScales {
  __device__ __forceinline__ void ask(int) {}
  template <int PART_ROWS, bool LAST>
  __device__ __forceinline__ void take(int) {}
  template <int TILES>
  __device__ __forceinline__ void add(float (&acc)[TILES][4], const float (&part)[TILES][4]) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[tile][j] += part[tile][j];
    }
  }
};

// Rows of a panel's scales, one panel after the other; after the last one that again, for panels of zeros.
struct GemmSm90ScalePanels {
  int32_t panel, last, apart;  // apart: panels of this walk

  __device__ __forceinline__ GemmSm90ScalePanels(const GemmSm90Params& p, int32_t first, int32_t apart)
      : panel(first), last(static_cast<int32_t>((p.k - 1) / kGemmSm90ScaleBlock)), apart(apart) {}
  __device__ __forceinline__ int32_t current() const { return min(panel, last); }
  __device__ __forceinline__ void advance() { panel += apart; }
};

// BLOCK_N columns of weight, 128 of them at a time.
template <int BLOCK_N>
class GemmSm90ManyRowsScales {
 public:
  // first_row: the lane's first of two, 8 apart.
  __device__ __forceinline__ GemmSm90ManyRowsScales(const GemmSm90Params& p, int32_t first_row, int32_t first_n,
                                                    int32_t first_panel)
      : panels_(p, first_panel, 1), x_stride_(p.x_scale_stride), of_weight_(p.weight_scale) {
    const int32_t last_row = static_cast<int32_t>(p.m) - 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) of_rows_[r] = p.x_scale + min(first_row + 8 * r, last_row);  // others are not stored
    const int32_t last_block = static_cast<int32_t>((p.n - 1) / kGemmSm90ScaleBlock);
    const int32_t block = first_n / kGemmSm90ScaleBlock;
    of_weight_ += block * p.weight_scale_stride;
    next_part_ = block < last_block ? p.weight_scale_stride : 0;
    now_ = fetch();
    panels_.advance();
  }

  __device__ __forceinline__ void ask(int row) {
    if (row == 0) next_ = fetch();
  }

  template <int PART_ROWS, bool LAST>
  __device__ __forceinline__ void take(int row) {
    static_assert(PART_ROWS == kGemmSm90ScaleBlock);
    const float of_weight = now_.weight[row / kGemmSm90ScaleBlock];
#pragma unroll
    for (int r = 0; r < 2; ++r) factors_[r] = now_.rows[r] * of_weight;
    if constexpr (LAST) {
      now_ = next_;
      panels_.advance();
    }
  }

  template <int TILES>
  __device__ __forceinline__ void add(float (&acc)[TILES][4], const float (&part)[TILES][4]) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[tile][j] = fmaf(part[tile][j], factors_[j / 2], acc[tile][j]);
    }
  }

 private:
  static constexpr int kParts = BLOCK_N / kGemmSm90ScaleBlock;

  struct Panel {
    float rows[2], weight[kParts];
  };

  __device__ __forceinline__ Panel fetch() const {
    const int64_t panel = panels_.current();
    Panel found;
#pragma unroll
    for (int r = 0; r < 2; ++r) found.rows[r] = of_rows_[r][panel * x_stride_];
#pragma unroll
    for (int part = 0; part < kParts; ++part) found.weight[part] = __ldg(of_weight_ + part * next_part_ + panel);
    return found;
  }

  GemmSm90ScalePanels panels_;
  int64_t x_stride_, next_part_;
  const float* of_weight_;
  const float* of_rows_[2];
  Panel now_, next_;
  float factors_[2];
};

// PART_M rows of x at a time.
template <int BLOCK_M, int PART_M>
class GemmSm90FewRowsScales {
 public:
  // first_n: of the group's 64 rows of weight, which lie in one block; num_rows: that there are of the tile's.
  __device__ __forceinline__ GemmSm90FewRowsScales(const GemmSm90Params& p, int32_t first_m, int32_t num_rows,
                                                   int32_t first_n, int32_t first_panel, int32_t panels_apart, int lane)
      : panels_(p, first_panel, panels_apart),
        x_stride_(p.x_scale_stride),
        of_weight_(p.weight_scale + first_n / kGemmSm90ScaleBlock * p.weight_scale_stride),
        of_rows_(p.x_scale + first_m + lane % 4 * 2),
        rows_left_(num_rows - lane % 4 * 2) {}

  __device__ __forceinline__ void ask(int first) {
    const int64_t panel = panels_.current();
    const float* const rows = of_rows_ + panel * x_stride_;
#pragma unroll
    for (int i = 0; i < PART_M / 4; ++i) {
      const int row = first + i / 2 * 8 + i % 2;
      factors_[i] = row < rows_left_ ? rows[row] : 0.0f;
    }
    weight_ = __ldg(of_weight_ + panel);
  }

  template <int PART_ROWS, bool LAST>
  __device__ __forceinline__ void take(int) {
    static_assert(PART_ROWS == PART_M);
#pragma unroll
    for (int i = 0; i < PART_M / 4; ++i) factors_[i] *= weight_;
    if constexpr (LAST) panels_.advance();
  }

  template <int TILES>
  __device__ __forceinline__ void add(float (&acc)[TILES][4], const float (&part)[TILES][4]) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[tile][j] = fmaf(part[tile][j], factors_[2 * tile + j % 2], acc[tile][j]);
    }
  }

 private:
  GemmSm90ScalePanels panels_;
  int64_t x_stride_;
  const float* of_weight_;
  const float* of_rows_;
  int32_t rows_left_;
  float weight_, factors_[PART_M / 4];
};

}  // namespace fastattn
