// Tiles of the Hopper GEMMs and the heuristic that picks one. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace fastattn {

enum class GemmSm90Norm { kNone, kRms, kLayer, kRmsGiven };  // of x's rows; the last: their squares are known

// Whether few rows' kernel adds up itself what a norm needs, beside the products.
constexpr bool gemm_sm90_counts(GemmSm90Norm norm) {
  return norm == GemmSm90Norm::kRms || norm == GemmSm90Norm::kLayer;
}

// Columns of a row whose squares are added up to one number (gemm_sm90_added_rows.cuh), of which all tiles have whole
// ones.
constexpr int kGemmSm90SquaresPart = 32;

// A CTA's tile: so many rows of x and of weight.
struct GemmSm90Tile {
  int block_m, block_n;
  int ctas_per_sm = 1;  // that share its memory
  bool turns = false;   // whether its groups have the tensor cores in turns
  // Of few rows: whether one group multiplies all of K, one panel after the other, as those of many rows do.
  bool in_order = false;
};

// Of gemm_sm90.cuh.
constexpr GemmSm90Tile kGemmSm90Tiles[] = {
    {64, 96},   {64, 224},  {128, 96},  {128, 128},          {128, 192},          {128, 224},          {128, 256},
    {192, 128}, {192, 192}, {192, 224}, {128, 128, 1, true}, {128, 192, 1, true}, {128, 256, 1, true}, {64, 128},
    {64, 192},  {64, 256},  {128, 160}};

// Whether a tile of so many columns has room for the sums of weight's rows, which zero points of x are multiplied by:
// 224 would have it in place of a stage.
constexpr bool gemm_sm90_has_zero_points(int block_n) { return block_n != 224; }

// Which of them there are: those that are the fastest somewhere. Sums in two levels (fp8) take more registers; no gates
// have turns, and half of their columns are stored, 32 at a time. Where blocks have scales, 128 columns have one, and
// where a residual is added 128 x 192 is there with turns, which hide what is waited for, and without, since their last
// tile's rows are one group's. `narrow`: whether there are tiles of 64 rows, of gates in 192 and 256 columns, of 96 and
// 160 columns, and instead of 128 x 128 in turns those without, which can be streamed.
constexpr bool gemm_sm90_has_tile(const GemmSm90Tile& tile, bool two_levels, bool gated = false,
                                  bool block_scales = false, bool zero_points = false, bool added = false,
                                  bool narrow = true) {
  if (block_scales && tile.block_n % 128 != 0) return false;
  if (zero_points && !gemm_sm90_has_zero_points(tile.block_n)) return false;
  if (tile.block_m == 64) {
    if (!narrow || two_levels) return false;
    return gated ? tile.block_n == 192 || tile.block_n == 256 : tile.block_n != 256;
  }
  if (tile.block_n == 96) return narrow && !gated;
  if (tile.block_n == 160) return narrow && !gated && !two_levels;
  if (gated && tile.block_n == 224) return false;
  if (gated) return !tile.turns && (!two_levels || tile.block_n <= 192);
  if (two_levels) return tile.turns ? tile.block_n == 256 : tile.block_n <= 192;
  if (tile.block_m == 128 && tile.block_n == 128) return tile.turns == !narrow;
  return tile.turns ? tile.block_n <= 192 : added || tile.block_m == 192 || tile.block_n > 192;
}

// Gates of products in 8 bits have no tiles of 64 rows.
constexpr bool gemm_sm90_has_8_bit_gates(const GemmSm90Tile& tile) { return tile.block_m != 64; }

// In which of them pairs of CTAs can share the stages of all tiles: those with the most to do for what is handed on,
// and in one level those with which 256 rows by 4,096 columns leave two pairs for each tile, but for gates (not
// measured). In two levels they lose 2 % by it elsewhere.
constexpr bool gemm_sm90_streams(const GemmSm90Tile& tile, bool two_levels, bool gated) {
  if (tile.block_m != 128) return false;
  if (tile.block_n == 256) return tile.turns == two_levels;
  return !gated && !two_levels && tile.block_n == 128 && !tile.turns;
}

// Beside which of them an SM has room for a CTA that gives norms (gemm_row_norms_sm90.cu): a warp of 64 registers a
// thread in each quarter of it, one of which has three of the tile's warps, with 128 then.
constexpr bool gemm_sm90_leaves_room(const GemmSm90Tile& tile) {
  return tile.block_m == 64 || (tile.block_m == 128 && tile.block_n <= 160 && !tile.turns);
}
constexpr int kGemmSm90NormCtasPerSm = 8;  // where it has room for nothing else

// Of gemm_sm90_few_rows.cuh.
constexpr GemmSm90Tile kGemmSm90FewRowsTiles[] = {{8, 64, 2},  {16, 64, 2},  {32, 64, 2},   {64, 64, 2},
                                                  {64, 64, 1}, {128, 64, 1}, {128, 128, 2}, {256, 128, 1}};

// The same, in order; of those above, tiles of 128 rows of weight are. A CTA has as many rows of weight as its
// configuration says, 16 to 64 by steps of 8, or of 16 with gates. With 8 the copy engine has more to do than memory.
constexpr GemmSm90Tile kGemmSm90InOrderTiles[] = {
    {8, 64, 2, false, true},  {8, 64, 1, false, true},  {16, 64, 2, false, true},
    {16, 64, 1, false, true}, {32, 64, 2, false, true}, {32, 64, 1, false, true},
    {64, 64, 2, false, true}, {64, 64, 1, false, true}, {128, 64, 1, false, true}};

// Which of these there are: where blocks have scales, few rows are 64 at most. With more, the scales of x's rows, of
// which a thread has one for every fourth, take longer than the weight.
constexpr bool gemm_sm90_has_few_rows_tile(const GemmSm90Tile& tile, bool block_scales) {
  return !block_scales || (tile.block_m <= 64 && tile.ctas_per_sm == 2);
}

// Rows of x up to which a head draws tokens in the kernel for few rows: with more, writing the logits and reading them
// again takes as long.
constexpr int64_t kGemmSm90MostSampledRows = 32;

// Its stages, of so many panels of 128 bytes of a row, in what a CTA has of 227 KiB, less 2 KiB for what is not in the
// ring.
struct GemmSm90FewRowsRing {
  int panels, num_stages;
};
constexpr GemmSm90FewRowsRing gemm_sm90_few_rows_ring(const GemmSm90Tile& tile) {
  const int panels = tile.block_n == 64 ? 2 : 1;
  return {panels, (227 * 1024 / tile.ctas_per_sm - 2048) / (panels * 128 * (tile.block_m + tile.block_n))};
}

// Panels of K up to which plain products may have more tiles of 64 rows above each other than two: of a product that is
// over soon it matters that there are many CTAs. With more, and in fp8, it was not measured, or is slower. With 17 to
// 32 rows of x they are faster than a split of K where panels are so few and columns so many.
constexpr int64_t kGemmSm90ShortPanels = 48;
constexpr int64_t kGemmSm90SomeRows = 17, kGemmSm90SomeRowsPanels = 16, kGemmSm90SomeRowsColumns = 3072;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums of squares of a row of so many columns.
constexpr int64_t gemm_sm90_squares_parts(int64_t columns) { return ceil_div(columns, kGemmSm90SquaresPart); }

// Operands of 8 bits have half the bytes, and tensor cores that are twice as fast: for a panel of 128 bytes everything
// is as with 16 bits, and there are half as many.
struct GemmSm90Problem {
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t num_sms;
  int64_t element_bytes = 2;  // of x and weight
  bool two_levels = false;    // of sums
  GemmSm90Norm norm = GemmSm90Norm::kNone;
  bool gated = false;         // rows of weight are those of gates and ups by eights
  bool block_scales = false;  // of 128 x 128, with sums in two levels
  bool zero_points = false;   // of x, in int8
  // Each sum is added up in the same order whatever M is: that of K, by one group of one CTA.
  bool in_order = false;
  bool added = false;       // a residual is
  bool fast_accum = false;  // of e4m3: sums of many rows are in one level

  int64_t num_panels() const { return ceil_div(element_bytes * k, 128); }

  int64_t num_pairs() const { return std::max<int64_t>(1, num_sms / 2); }  // of CTAs that run at a time

  bool narrow() const { return !fast_accum; }
  bool plain() const { return norm == GemmSm90Norm::kNone && !gated && !added && !block_scales; }
  bool is_short() const {
    return !gated && !block_scales && narrow() && !two_levels && num_panels() <= kGemmSm90ShortPanels;
  }
  // Of them in 16 bits, with so many rows, it was measured that a cluster begins later, and tiles of fewer rows.
  bool has_lower_tiles() const { return is_short() && element_bytes == 2 && m >= 16 && m <= 128; }
};

struct GemmSm90Config {
  bool few_rows;  // which kernel
  GemmSm90Tile tile;
  int num_splits;   // few rows: CTAs of a cluster, which share the K of a tile
  int64_t m_tiles;  // few rows: of CTAs, else of pairs of CTAs
  int64_t n_tiles;
  int rows;          // of x that a CTA has of a tile's: all CTAs as many, and nothing is loaded that is not there
  int group_rows;    // tiles are taken column by column in groups of so many rows of tiles
  bool stream_k;     // many rows: pairs of CTAs have equal shares of the stages of all tiles, not whole tiles
  bool gives_norms;  // few rows: what a norm needs comes from a kernel in front too
  int norm_ctas;     // of it, which gives it of num_row_norms rows
  int64_t num_row_norms;
  int weight_rows;  // that a CTA has of a tile's, or a pair of CTAs: all but the last one of a column as many
  int64_t num_ctas;

  // With stream_k, in the workspaces: what a CTA hands on, and a mark of each of its groups.
  int64_t num_sums() const { return stream_k ? num_ctas * tile.block_m * tile.block_n : 0; }
  int64_t num_marks() const { return stream_k ? num_ctas * 2 : 0; }
};

// All that follows from the tile.
inline void set_gemm_sm90_grid(GemmSm90Config& config, const GemmSm90Problem& problem, int num_splits) {
  config.num_splits = num_splits;
  const int64_t num_sharing = config.few_rows ? 1 : 2;  // CTAs with a tile's rows
  config.m_tiles = ceil_div(problem.m, num_sharing * config.tile.block_m);
  config.rows = static_cast<int>(ceil_div(problem.m, num_sharing * config.m_tiles));
  if (config.weight_rows == 0) config.weight_rows = config.tile.block_n;
  config.n_tiles = ceil_div(problem.n, config.weight_rows);
  // What the pairs that run at a time read together is the least where their tiles are a square; groups are of a size.
  const double square = std::sqrt(static_cast<double>(problem.num_pairs() * config.tile.block_n) /
                                  static_cast<double>(num_sharing * config.tile.block_m));
  const int64_t num_groups = std::max<int64_t>(1, std::llround(static_cast<double>(config.m_tiles) / square));
  config.group_rows = static_cast<int>(ceil_div(config.m_tiles, num_groups));
  const int64_t num_tiles = config.m_tiles * config.n_tiles;
  const int64_t shares = config.stream_k ? num_tiles * problem.num_panels() : num_tiles;
  int64_t num_pairs = std::min(shares, problem.num_pairs());
  // As many to each tile, where few are left over: a tile then waits for fewer, and those that share one run abreast.
  const int64_t num_even = num_pairs / num_tiles * num_tiles;
  if (config.stream_k && 20 * num_even >= 19 * num_pairs) num_pairs = num_even;
  config.num_ctas = config.few_rows ? num_tiles * num_splits : 2 * num_pairs;
  const bool gives_norms = problem.norm != GemmSm90Norm::kNone && (!config.few_rows || config.gives_norms);
  config.num_row_norms = gives_norms ? problem.m : 0;
  const int64_t at_once = !config.few_rows && gemm_sm90_leaves_room(config.tile) ? 1 : kGemmSm90NormCtasPerSm;
  config.norm_ctas = static_cast<int>(std::min(config.num_row_norms, at_once * problem.num_sms));
}

// Rows of weight that a CTA of few rows has where they are shared out evenly, so that all CTAs run at once; 0 where
// whole tiles do, or it would be fewer than 16, and but for plain products, of which that was measured. (It cannot be
// where 32 columns have a sum of squares, or 128 a scale.)
inline int gemm_sm90_rows_at_once(const GemmSm90Problem& problem, const GemmSm90Tile& tile, int num_splits) {
  const int64_t places = problem.num_sms * tile.ctas_per_sm / (num_splits * ceil_div(problem.m, tile.block_m));
  if (!problem.plain() || places == 0) return 0;
  const int64_t rows = ceil_div(ceil_div(problem.n, places), 8) * 8;
  return rows >= 16 && rows < tile.block_n ? static_cast<int>(rows) : 0;
}

// Microseconds, about: the constants are fitted to what an H100 takes, so that configurations rank as they do there.
inline double gemm_sm90_time(const GemmSm90Config& config, const GemmSm90Problem& problem) {
  const double weight_us = static_cast<double>(problem.element_bytes) * static_cast<double>(problem.n) *
                           static_cast<double>(problem.k) / 2.75e6;  // to read it
  const int64_t block_m = config.tile.block_m, block_n = config.tile.block_n;
  if (!config.few_rows) {
    const int64_t num_tiles = config.m_tiles * config.n_tiles, num_pairs = config.num_ctas / 2;
    const double num_waves = static_cast<double>(ceil_div(num_tiles, num_pairs));
    const double tile_size = static_cast<double>(block_m * block_n);
    // With 64 rows a panel is soon multiplied, and what it takes to come counts, the more so the fewer SMs ask for
    // some.
    const bool half = block_m == 64;
    // A panel's products at 1,755 MHz, and what lies between them, more where one group has the tensor cores alone. Two
    // groups add up a second level at the same time, three find their own way.
    const double products_us =
        ((half ? 0.145 : 0.08) + tile_size / 56160) * (problem.two_levels && block_m == 128 ? 1.09 : 1.0);
    // A norm's kernel begins in front, and where there is no room for its CTAs beside others it also ends there.
    const double read_x_us = 0.5 + static_cast<double>(problem.m) * static_cast<double>(problem.k) / 4.0e6;
    const double norm_us = config.num_row_norms == 0 ? 0.0 : gemm_sm90_leaves_room(config.tile) ? 1.0 : 1.0 + read_x_us;
    // With turns one group writes while the other multiplies, but for the last time. Those of sums in two levels both
    // write at the same time. A residual is waited for, by one group with turns, which has no registers to ask early.
    const bool own_tiles = config.tile.turns && !problem.two_levels;
    const double epilogue_us = tile_size * (6.7e-5 + (problem.added ? own_tiles ? 4.5e-4 : 1.4e-4 : 0.0));
    const double num_epilogues = own_tiles ? 1.0 : num_waves;
    double num_panels = num_waves * static_cast<double>(problem.num_panels()), handed_us = 0.0;
    if (config.stream_k) {
      // Pairs that are at different places of K share less in the L2 cache, the less so the larger the weight is. One
      // tile's sums go to memory, and those of all others that share a tile come from there.
      const double part = static_cast<double>(num_tiles) / static_cast<double>(num_pairs);  // of a wave
      const double num_others = static_cast<double>(ceil_div(num_pairs, num_tiles));
      num_panels = part * static_cast<double>(problem.num_panels()) * (1.06 + 0.003 * std::max(0.0, weight_us - 45.0));
      // Where pairs are no multiple of tiles, some end one tile and begin another.
      const double uneven = num_pairs % num_tiles == 0 ? 0.0 : 1.4e-4;
      handed_us = tile_size * (7.0e-5 + 1.0e-4 * num_others + uneven);
    }
    const double idle = 1.0 - static_cast<double>(config.num_ctas) / static_cast<double>(problem.num_sms);
    const double panel_us = std::max(products_us, half ? 0.27 : 0.0);
    const double us = 6.8 + num_panels * panel_us + num_epilogues * epilogue_us;
    // Boxes of fewer rows of weight are read less well.
    double read_us = 8.0 + (block_n < 128 || block_n == 160 ? 1.18 : 1.13) * weight_us;
    if (half) {
      // A last wave of few tiles is not read faster than it is multiplied. Behind more waves, and longer ones, pairs
      // begin it at different times, so that more of it runs beside others' tiles.
      const double last = 1.0 - (num_waves - 1.0) * static_cast<double>(num_pairs) / static_cast<double>(num_tiles);
      const double narrow = 0.1 * std::max(0.0, 1.0 - static_cast<double>(block_n) / 192.0);
      const double all_us = (1.06 + narrow + 0.15 * std::max(0.0, idle)) * weight_us;
      const double tile_us = static_cast<double>(problem.num_panels()) * panel_us;
      const double apart_us = 0.15 * (num_waves - 1.0) * std::max(0.0, tile_us - 10.0);
      read_us = (1.0 - last) * all_us + std::max(8.5 + last * all_us, 6.8 + tile_us - apart_us);
    }
    // The second term: of those that wait for the weight the one with the least to do, for memories that are faster.
    return std::max(us, read_us) + 0.02 * us + handed_us + norm_us;
  }

  const GemmSm90FewRowsRing ring = gemm_sm90_few_rows_ring(config.tile);
  const int64_t num_steps = ceil_div(ceil_div(problem.num_panels(), ring.panels), config.num_splits);
  const bool in_cluster = config.num_splits > 1;
  const double num_ctas = static_cast<double>(config.num_ctas), num_sms = static_cast<double>(problem.num_sms);
  const double ctas_per_sm = static_cast<double>(config.tile.ctas_per_sm);

  // What bounds a step of a CTA: how much the copy engine has in flight, what an SM takes in, or its tensor cores.
  const int64_t weight_rows = config.weight_rows;
  const double step_bytes = static_cast<double>(128 * ring.panels * (block_m + weight_rows));
  const double step_flops = static_cast<double>(128 * ring.panels * block_m * block_n);
  const double at_once = std::min(ctas_per_sm, std::max(1.0, num_ctas / num_sms));  // CTAs of an SM
  const double step_us =
      std::max({1.7 / (ring.num_stages - 1), at_once * step_bytes / 85e3, at_once * step_flops / 6.5e6});
  // Sums go to shared memory and come back from there, or from another SM's.
  const double parts = block_n == 64 && !config.tile.in_order ? 2.0 : 1.0;
  const double sums_us = parts * static_cast<double>(block_m * block_n) * (in_cluster ? 2.0e-4 : 1.0e-4) +
                         0.35 * static_cast<double>(config.num_splits - 1) +
                         (in_cluster && problem.has_lower_tiles() ? 0.35 : 0.0);
  // Clusters of more than two leave SMs over.
  const double clusters_fit = config.num_splits <= 2 ? 1.0 : config.num_splits <= 4 ? 0.9 : 0.75;
  const double num_waves = std::ceil(num_ctas / (num_sms * clusters_fit * ctas_per_sm));
  const bool has_norm = gemm_sm90_counts(problem.norm) && !config.gives_norms;
  const bool has_mean = has_norm && problem.norm == GemmSm90Norm::kLayer;
  const double row_us = has_mean ? 0.00115 : has_norm ? 0.0006 : 0.0;  // of an SM, to look at a panel of a row of x
  const double norm_us = at_once * static_cast<double>(ring.panels * block_m) * row_us;
  const double waves_us = num_waves * static_cast<double>(num_steps) * (step_us + norm_us);
  const double between_us = config.tile.ctas_per_sm == 1 ? (num_waves - 1.0) * (2.0 + sums_us) : 0.0;
  const double l2_us = step_bytes * static_cast<double>(num_steps) * num_ctas / 8.0e6;
  // 128 bytes of a row at a time are read less well than 256, and from few SMs a little less well. So are fewer rows at
  // a time than 48, and what some SMs have one more CTA of than others.
  const double uneven =
      num_ctas <= num_sms * ctas_per_sm ? std::ceil(num_ctas / num_sms) * num_sms / num_ctas - 1.0 : 0.0;
  const double read_us =
      weight_us * (ring.panels == 1 ? 1.06 : 1.0) * (1.0 + 0.1 * std::max(0.0, 1.0 - num_ctas / num_sms));
  const double sharing_us =
      weight_us * (0.08 * std::max(0.0, 1.0 - static_cast<double>(weight_rows) / 48.0) + 0.02 * uneven);
  // Of sums of squares and norms that are given, too, a part is not hidden.
  const double all_norm_us = problem.norm == GemmSm90Norm::kNone
                                 ? 0.0
                                 : 0.024 * static_cast<double>(block_m) + (config.num_row_norms > 0 ? 0.6 : 0.0);
  return 8.0 + std::max({read_us, l2_us, waves_us}) + 0.02 * waves_us + between_us + sums_us + sharing_us + all_norm_us;
}

// The best by that measure. Unless it is to be in order, a row's result depends on M (tile and splits), so that it is
// not bitwise independent of its batch.
inline GemmSm90Config gemm_sm90_config(const GemmSm90Problem& problem) {
  GemmSm90Config best = {};
  double best_us = 0.0;
  const auto consider = [&](bool few_rows, const GemmSm90Tile& tile, int num_splits, bool stream_k = false,
                            int weight_rows = 0, bool gives_norms = false) {
    GemmSm90Config config = {};
    config.gives_norms = gives_norms;
    config.weight_rows = weight_rows;
    config.few_rows = few_rows;
    config.stream_k = stream_k;
    config.tile = tile;
    set_gemm_sm90_grid(config, problem, num_splits);
    const double us = gemm_sm90_time(config, problem);
    if (best.num_ctas == 0 || us < best_us) {
      best = config;
      best_us = us;
    }
  };
  constexpr int64_t kMostFewRows = 256;
  const auto too_large = [&](const GemmSm90Tile& tile) {  // a smaller one does
    return tile.block_m > 8 && tile.block_m / 2 >= problem.m;
  };
  if (problem.m <= kMostFewRows && problem.in_order) {
    for (const GemmSm90Tile& tile : kGemmSm90InOrderTiles) {
      if (too_large(tile) || tile.block_m < std::min<int64_t>(problem.m, 64) || 2 * tile.block_m < problem.m) continue;
      for (int rows = 16; rows <= tile.block_n; rows += problem.gated ? 16 : 8) consider(true, tile, 1, false, rows);
    }
  }
  if (problem.m <= kMostFewRows) {
    for (const GemmSm90Tile& tile : kGemmSm90FewRowsTiles) {
      // Of a short product's tiles up to four lie above each other where an SM has one at most: they begin at once.
      const bool lower = problem.has_lower_tiles() && problem.m > 16 && problem.n <= 1024 &&
                         4 * tile.block_m >= problem.m && (problem.plain() || problem.norm == GemmSm90Norm::kRmsGiven);
      const bool usual = tile.block_m >= std::min<int64_t>(problem.m, problem.is_short() ? 64 : 128);
      if (too_large(tile) || (!usual && !lower)) continue;
      if (!gemm_sm90_has_few_rows_tile(tile, problem.block_scales)) continue;
      if (problem.in_order) {
        if (tile.block_n == 128) consider(true, tile, 1);
        continue;
      }
      const int64_t num_steps = ceil_div(problem.num_panels(), gemm_sm90_few_rows_ring(tile).panels);
      for (int splits = 1; splits <= std::min<int64_t>(num_steps, 8); ++splits) {
        const int64_t num_tiles = ceil_div(problem.m, tile.block_m) * ceil_div(problem.n, tile.block_n);
        if (!usual && num_tiles * splits > problem.num_sms) continue;
        const bool has_norm = problem.norm != GemmSm90Norm::kNone && !problem.in_order;
        if (has_norm && tile.block_m >= 32) consider(true, tile, splits, false, 0, true);
        // Sums that are given, 32 columns' each, are too many for so many rows of a CTA.
        if (problem.norm == GemmSm90Norm::kRmsGiven && tile.block_m >= 32) continue;
        consider(true, tile, splits);
        const int rows = gemm_sm90_rows_at_once(problem, tile, splits);
        if (rows > 0) consider(true, tile, splits, false, rows);
      }
    }
  }
  const bool some_rows =
      problem.is_short() && problem.num_panels() <= kGemmSm90SomeRowsPanels && problem.n >= kGemmSm90SomeRowsColumns;
  if (problem.m >= (some_rows ? kGemmSm90SomeRows : 33)) {
    for (const GemmSm90Tile& tile : kGemmSm90Tiles) {
      if (!gemm_sm90_has_tile(tile, problem.two_levels, problem.gated, problem.block_scales, problem.zero_points,
                              problem.added, problem.narrow()) ||
          (problem.gated && problem.element_bytes == 1 && !gemm_sm90_has_8_bit_gates(tile))) {
        continue;
      }
      if (tile.block_m == 64 ? problem.m > 128 && !problem.is_short() : problem.m <= 64) continue;
      consider(false, tile, 1);
      const int64_t num_tiles = ceil_div(problem.m, 2 * tile.block_m) * ceil_div(problem.n, tile.block_n);
      if (!problem.in_order && gemm_sm90_streams(tile, problem.two_levels, problem.gated) &&
          num_tiles < problem.num_pairs() && num_tiles * problem.num_panels() < INT32_MAX) {
        consider(false, tile, 1, true);
      }
    }
  }
  return best;
}

}  // namespace fastattn
