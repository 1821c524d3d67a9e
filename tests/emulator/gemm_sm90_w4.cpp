// Draws calls of the Hopper GEMMs for weights of 4 bits and holds their results against a reference.
#include "gemm/gemm_sm90_w4.h"

#include <algorithm>

#include "arch/e2m1.cuh"
#include "drawn_call.h"
#include "gemm/fp4_to_fp8.h"
#include "gemm/w4_tiles.h"
#include "w4_tiles.h"

namespace {

using namespace emulator;
using fastattn::GemmSm90W4Config;
using fastattn::GemmSm90W4Params;

struct Format {
  const char* name;
  int group;  // 0: int4, of any size
  cudaError_t (*launch)(const GemmSm90W4Params&, cudaStream_t);
};
const Format kFormats[] = {{"nvfp4", 16, fastattn::gemm_nvfp4_sm90},
                           {"mxfp4", 32, fastattn::gemm_mxfp4_sm90},
                           {"int4", 0, fastattn::gemm_int4_sm90}};

// Holds what the kernel makes of a weight's rows against tiles; scales of groups of 32 are relative to a row's largest.
void check_w4_tiles(const GemmSm90W4Params& p, fastattn::W4Order order, int group, const std::vector<uint32_t>& tiles) {
  std::vector<uint32_t> made(tiles.size());
  std::vector<float> global_scale(p.n);
  fastattn::W4TilesParams params;
  params.packed = static_cast<const uint8_t*>(p.weight);
  params.packed_stride = p.weight_stride;
  params.global_scale = p.global_scale;
  params.order = order;
  params.n = p.n;
  params.k = p.k;
  params.tiles = made.data();
  params.scaled_globally = global_scale.data();
  std::vector<uint8_t> scales;
  const auto* const given = static_cast<const uint8_t*>(p.weight_scale);
  if (group != 0) {
    params.scale = given;
    params.scale_stride = p.scale_stride;
    params.group_size = group;
    scales.resize(p.n * p.k / group);
    params.scale_tiles = scales.data();
  }
  if (w4_tiles(params, nullptr) != cudaSuccess) fail("no kernel takes the weight");
  if (made != tiles) fail("tiles of codes are others");
  if (group == 0) return;
  std::vector<int> shifts(p.n);
  for (int64_t n = 0; group == 32 && n < p.n; ++n) {
    const uint8_t* const row = given + n * p.scale_stride;
    shifts[n] = 133 - *std::max_element(row, row + p.k / 32);
    const float before = p.global_scale == nullptr ? 1.0f : p.global_scale[n];
    if (global_scale[n] != std::ldexp(before, shifts[n])) fail("another global scale");
  }
  const auto moved = [&](int64_t n, int64_t g) {
    return static_cast<uint8_t>(std::max(given[n * p.scale_stride + g] + shifts[n], 0));
  };
  if (scales != scale_tiles_of(p.n, p.k, 64 / group, moved)) fail("tiles of scales are others");
}

template <typename T>
void run_call(const Format& format, bool many_rows, const fastattn::GemmSm90Tile& tile) {
  constexpr int kBehind = 64;  // elements behind out that nobody may write
  GemmSm90W4Params p;
  p.dtype = TypeInfo<T>::kDType;
  GemmSm90W4Config& config = p.config;
  config.many_rows = many_rows;
  config.tile = tile;
  config.stream_k = many_rows && one_in(2);
  p.m = pick({1, between(1, tile.block_m), tile.block_m, between(1, 2 * tile.block_m)});
  p.n = many_rows ? 16 * between(1, 2 * tile.block_n / 16 + 2) : 8 * between(1, 2 * tile.block_n / 8 + 3);
  p.k = 64 * pick({1, 4, between(1, 12), between(12, 40)});
  const int64_t num_steps = fastattn::ceil_div(p.k, fastattn::kGemmSm90W4StageK);
  set_gemm_sm90_w4_grid(config, {p.m, p.n, p.k, 4.5, many_rows ? pick<int64_t>({1, 2, 7, 14, 132}) : 132},
                        many_rows ? 1 : static_cast<int>(std::min<int64_t>(num_steps, pick({1, 2, 3, 5, 8}))));
  config.group_rows = pick({1, 2, 8});
  const Workspaces workspaces(p);

  p.x_stride = p.k + 8 * pick({0, 0, 1, 5});
  Tensor<T> x(p.m * p.x_stride + 8);  // NaN between the rows
  const bool units = one_in(4);       // rows of x, which make single weights, exact ones
  for (int64_t m = 0; m < p.m; ++m) {
    const int64_t unit = between(0, static_cast<int>(p.k) - 1);
    for (int64_t k = 0; k < p.k; ++k) x.set(m * p.x_stride + k, units ? static_cast<float>(k == unit) : normal());
  }
  p.weight_stride = p.k / 2 + 16 * pick({0, 0, 1, 3});
  std::vector<uint8_t> codes(p.n * p.weight_stride + 16);
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(between(0, 255));

  const int64_t group = format.group != 0 ? format.group : pick<int64_t>({64, 128, 192, p.k});
  const int64_t num_groups = fastattn::ceil_div(p.k, group);
  p.group_size = fastattn::FastDivide(static_cast<int32_t>(group));
  p.scale_stride = num_groups + 4 * pick({0, 0, 1});
  Tensor<T> scales(format.group == 0 ? p.n * p.scale_stride : 0);
  std::vector<uint8_t> scale_bits(p.n * p.scale_stride, format.group == 16 ? 0x7f : 0xff);  // NaN between the rows
  p.zero_point_stride = num_groups + pick({0, 3});
  std::vector<int8_t> zero_points(p.n * p.zero_point_stride);
  const bool has_zero_points = format.group == 0 && one_in(2);
  std::vector<float> values(p.n * num_groups);  // of scales
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t idx = n * p.scale_stride + g;
      if (format.group == 0) {
        scales.set(idx, std::fabs(normal()) * 0.1f);
        values[n * num_groups + g] = scales.values[idx];
        zero_points[n * p.zero_point_stride + g] = static_cast<int8_t>(has_zero_points ? between(-8, 7) : 0);
      } else {
        const int bits = format.group == 16 ? between(0, 126) | between(0, 1) << 7 : between(110, 132);
        scale_bits[idx] = static_cast<uint8_t>(bits);
        values[n * num_groups + g] = format.group == 16 ? fastattn::from_e4m3<float>(scale_bits[idx])
                                                        : fastattn::from_e8m0<float>(scale_bits[idx]);
      }
    }
  }
  std::vector<float> global_scales(p.n);
  for (float& scale : global_scales) scale = 50.0f + static_cast<float>(between(0, 1000));
  Tensor<T> bias(p.n);
  for (int64_t n = 0; n < p.n; ++n) bias.set(n, normal());
  std::vector<T> out(p.m * p.n + kBehind, T(NAN));
  p.x = x.data.data();
  p.weight = codes.data();
  p.weight_scale = format.group == 0 ? static_cast<const void*>(scales.data.data()) : scale_bits.data();
  p.zero_point = has_zero_points ? zero_points.data() : nullptr;
  // Sums of thousands of 6 * 448 leave fp16.
  p.global_scale = !units && format.group != 0 && (format.group == 16 || one_in(2)) ? global_scales.data() : nullptr;
  p.bias = !units && one_in(2) ? bias.data.data() : nullptr;
  p.out = out.data();
  current_call += std::string(": ") + format.name + " " + TypeInfo<T>::kName + " m " + std::to_string(p.m) + ", n " +
                  std::to_string(p.n) + ", k " + std::to_string(p.k) + ", groups of " + std::to_string(group) +
                  (has_zero_points ? " with zero points" : "") + "; block " + std::to_string(tile.block_m) + " x " +
                  std::to_string(tile.block_n) + (many_rows ? " of many rows" : "") +
                  (config.stream_k ? ", stream-K" : "") + ", " + std::to_string(config.num_splits) + " splits, " +
                  std::to_string(config.num_ctas) + " CTAs";

  const auto code_of = [&](int64_t n, int64_t k) { return codes[n * p.weight_stride + k / 2] >> k % 2 * 4 & 15; };
  std::vector<uint32_t> tiles;
  std::vector<uint8_t> scale_tiles;
  if (many_rows) {
    tiles = tiles_of(p.n, p.k, 16, format.group == 0 ? int4_word : fp4_word, code_of);
    check_w4_tiles(p, format.group == 0 ? fastattn::W4Order::kInt4 : fastattn::W4Order::kFp4, format.group, tiles);
    p.weight = tiles.data();
    if (format.group != 0) {
      scale_tiles = scale_tiles_of(p.n, p.k, 64 / format.group,
                                   [&](int64_t n, int64_t g) { return scale_bits[n * p.scale_stride + g]; });
      p.weight_scale = scale_tiles.data();
    }
  }

  std::vector<double> weight(p.n * p.k);
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.k; ++k) {
      const int code = code_of(n, k);
      const float scale = values[n * num_groups + k / group];
      const int zero_point = zero_points[n * p.zero_point_stride + (format.group == 0 ? k / group : 0)];
      const float number = format.group == 0 ? static_cast<float>(code - 8 - zero_point) : e2m1_value(code);
      weight[n * p.k + k] = static_cast<float>(T(number * scale));
    }
  }
  const auto launch = [&] {
    if (format.launch(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < p.k; ++k) {
        const double term = double{x.values[m * p.x_stride + k]} * weight[n * p.k + k];
        sum += term;
        size += std::fabs(term);
      }
      const double divisor = p.global_scale == nullptr ? 1.0 : global_scales[n];
      const double expected = sum / divisor + (p.bias == nullptr ? 0.0 : bias.values[n]);
      const double got = static_cast<float>(out[m * p.n + n]);
      // Rounded once, from a sum in fp32.
      const double allowed = units ? 0.0
                                   : std::fabs(expected) * (std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7) +
                                         size / divisor * 0x1p-20 + 1e-6;
      expect_near(m, n, got, expected, allowed);
    }
  }
  expect_untouched_behind(out, p.m * p.n);
  if (one_in(3)) expect_same_again(out, launch);
}

// With x in e4m3, by the formulas of gemm_sm90_w4_operands.cuh; of MXFP4 first what the kernel wants to know of a row.
template <typename T>
void run_fp8_call(int group, bool many_rows, const fastattn::GemmSm90Tile& tile) {
  GemmSm90W4Params p;
  p.dtype = TypeInfo<T>::kDType;
  p.fast_accum = !many_rows || tile.block_m > fastattn::kGemmSm90W4TwoLevelsMaxM || one_in(2);
  GemmSm90W4Config& config = p.config;
  config.many_rows = many_rows;
  config.tile = tile;
  config.stream_k = many_rows && one_in(2);
  p.m = pick({1, between(1, tile.block_m), between(1, 2 * tile.block_m)});
  p.n = many_rows ? 16 * between(1, 2 * tile.block_n / 16 + 2) : 8 * between(1, 2 * tile.block_n / 8 + 3);
  p.k =
      many_rows ? 64 * pick({1, 2, between(1, 6), between(6, 20)}) : 32 * pick({1, 4, between(1, 12), between(12, 40)});
  const int64_t num_steps = fastattn::ceil_div(p.k, fastattn::kGemmSm90W4StageK);
  set_gemm_sm90_w4_grid(config,
                        {p.m, p.n, p.k, 4.5, many_rows ? pick<int64_t>({1, 2, 7, 14, 132}) : 132, 1, !p.fast_accum},
                        many_rows ? 1 : static_cast<int>(std::min<int64_t>(num_steps, pick({1, 2, 3, 5, 8}))));
  config.group_rows = pick({1, 2, 8});
  const Workspaces workspaces(p);

  p.x_stride = p.k + 16 * pick({0, 0, 1, 5});
  Tensor<__nv_fp8_e4m3> x(p.m * p.x_stride + 16);  // NaN between the rows
  const bool units = one_in(3);                    // rows of x, which make single weights, exact ones
  for (int64_t m = 0; m < p.m; ++m) {
    const int64_t unit = between(0, static_cast<int>(p.k) - 1);
    for (int64_t k = 0; k < p.k; ++k) x.set(m * p.x_stride + k, units ? static_cast<float>(k == unit) : normal());
  }
  p.weight_stride = p.k / 2 + 16 * pick({0, 0, 1, 3});
  std::vector<uint8_t> codes(p.n * p.weight_stride + 16);
  for (uint8_t& byte : codes) byte = static_cast<uint8_t>(between(0, 255));
  const int64_t num_groups = p.k / group;
  p.scale_stride = num_groups + 2 * pick({0, 0, 1});
  std::vector<uint8_t> scales(p.n * p.scale_stride, group == 16 ? 0x7f : 0xff);  // NaN between the rows
  // In tiles a scale is at most 133, and no row's largest matters to it.
  const int spread = pick({3, 14, 40});
  const int first = many_rows                   ? between(120, 133) - spread
                    : std::is_same_v<T, __half> ? between(95, 110)
                                                : between(60, 150);
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t g = 0; g < num_groups; ++g) {
      const int bits = group == 16 ? between(0, 126) | between(0, 1) << 7 : between(first, first + spread);
      scales[n * p.scale_stride + g] = static_cast<uint8_t>(bits);
    }
  }
  std::vector<float> global_scales(p.n), x_scales(p.m), row_scales(p.n, NAN);
  for (float& scale : global_scales) scale = 50.0f + static_cast<float>(between(0, 1000));
  for (float& scale : x_scales) scale = units ? 1.0f : std::exp2(normal());
  std::vector<uint8_t> exponents(p.n);
  Tensor<T> bias(p.n);
  for (int64_t n = 0; n < p.n; ++n) bias.set(n, normal());
  std::vector<T> out(p.m * p.n, T(NAN));
  p.x = x.data.data();
  p.weight = codes.data();
  p.weight_scale = scales.data();
  p.global_scale = !units && one_in(2) ? global_scales.data() : nullptr;
  p.bias = !units && one_in(2) ? bias.data.data() : nullptr;
  p.x_scale = x_scales.data();
  p.x_scale_stride = one_in(4) ? 0 : 1;
  p.out = out.data();
  current_call += std::string(": e4m3 with groups of ") + std::to_string(group) + (p.fast_accum ? " fast" : "") +
                  " to " + TypeInfo<T>::kName + " m " + std::to_string(p.m) + ", n " + std::to_string(p.n) + ", k " +
                  std::to_string(p.k) + "; block " + std::to_string(tile.block_m) + (many_rows ? " of many rows" : "") +
                  (config.stream_k ? ", stream-K" : "") + ", " + std::to_string(config.num_splits) + " splits, " +
                  std::to_string(config.num_ctas) + " CTAs" + (units ? ", units" : "");

  // The same weight in e4m3, by the kernel that makes it in memory, and by the formula.
  std::vector<uint8_t> q(p.n * p.k);
  fastattn::Fp4ToFp8Params convert;
  convert.packed = codes.data();
  convert.scale = scales.data();
  convert.global_scale = p.global_scale;
  convert.packed_stride = p.weight_stride;
  convert.scale_stride = p.scale_stride;
  convert.group_size = group;
  convert.n = p.n;
  convert.k = p.k;
  convert.q = q.data();
  convert.q_stride = p.k;
  convert.weight_scale = row_scales.data();
  convert.row_exponent = exponents.data();
  if (fp4_to_fp8(convert, nullptr) != cudaSuccess) fail("no kernel takes the weight");
  std::vector<double> weight(p.n * p.k), factors(p.n);
  for (int64_t n = 0; n < p.n; ++n) {
    const uint8_t* const row = &scales[n * p.scale_stride];
    const int largest = many_rows ? 133 : *std::max_element(row, row + num_groups);
    const double divisor = p.global_scale == nullptr ? 1.0 : global_scales[n];
    factors[n] = (group == 16 ? 8.0 : std::exp2(largest - 127 - 6)) / divisor;
    if (!many_rows && group == 32 && exponents[n] != largest) fail("another scale is said to be the largest");
    if (!many_rows && !(std::fabs(row_scales[n] - factors[n]) <= factors[n] * 0x1p-23)) {
      fail("a row's factor is another one");
    }
    for (int64_t k = 0; k < p.k; ++k) {
      const double step =
          group == 16 ? fastattn::from_e4m3<float>(row[k / 16]) / 8.0 : std::exp2(6 + row[k / 32] - largest);
      const double value = e2m1_value(codes[n * p.weight_stride + k / 2] >> k % 2 * 4 & 15) * step;
      const __nv_fp8_e4m3 rounded(static_cast<float>(value));
      weight[n * p.k + k] = static_cast<float>(rounded);
      if (!many_rows && q[n * p.k + k] != rounded.__x) fail("a weight in memory is another one");
    }
  }
  p.row_scale = row_scales.data();
  p.row_exponent = exponents.data();
  std::vector<uint32_t> tiles;
  std::vector<uint8_t> scale_tiles;
  if (many_rows) {
    tiles = tiles_of(p.n, p.k, 8, fp8_word,
                     [&](int64_t n, int64_t k) { return codes[n * p.weight_stride + k / 2] >> k % 2 * 4 & 15; });
    scale_tiles =
        scale_tiles_of(p.n, p.k, 64 / group, [&](int64_t n, int64_t g) { return scales[n * p.scale_stride + g]; });
    check_w4_tiles(p, fastattn::W4Order::kFp8, group, tiles);
    p.weight = tiles.data();
    p.weight_scale = scale_tiles.data();
  }

  const auto launch = [&] {
    cudaError_t error;
    if (many_rows) {
      error = group == 16 ? gemm_nvfp4_fp8_sm90_many_rows(p, nullptr) : gemm_mxfp4_fp8_sm90_many_rows(p, nullptr);
    } else {
      error = group == 16 ? gemm_nvfp4_fp8_sm90(p, nullptr) : gemm_mxfp4_fp8_sm90(p, nullptr);
    }
    if (error != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  const double lost = 0x1p-13 * static_cast<double>(p.fast_accum ? fastattn::ceil_div(p.k, 32) : 4);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < p.k; ++k) {
        const double term = double{x.values[m * p.x_stride + k]} * weight[n * p.k + k];
        sum += term;
        size += std::fabs(term);
      }
      const double scale = x_scales[m * p.x_scale_stride] * factors[n],
                   added = p.bias == nullptr ? 0.0 : bias.values[n];
      const double expected = sum * scale + added, got = static_cast<float>(out[m * p.n + n]);
      // fp16 holds multiples of 2^-24, and nothing beyond 65504.
      const double rounding = std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
      const double smallest = std::is_same_v<T, __half> ? 0x1p-25 : 1e-38;
      const double allowed = units ? (std::is_same_v<T, __half> ? smallest : 0.0)
                                   : std::fabs(expected) * rounding + size * scale * lost +
                                         (std::fabs(sum * scale) + std::fabs(added)) * 0x1p-20 + smallest;
      if (std::is_same_v<T, __half> && std::fabs(expected) + allowed > 65000.0) continue;
      expect_near(m, n, got, expected, allowed);
    }
  }
  if (!one_in(3)) return;
  const std::vector<T> first_out = out;
  std::fill(out.begin(), out.end(), T(NAN));
  launch();
  if (std::memcmp(first_out.data(), out.data(), out.size() * sizeof(T)) != 0) fail("two runs differ");
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int size) {
    struct Choice {
      bool many_rows;
      fastattn::GemmSm90Tile tile;
    };
    std::vector<Choice> choices;
    for (const auto& tile : fastattn::kGemmSm90W4Tiles) {
      if (size == 0 || tile.block_m == size) choices.push_back({false, tile});
    }
    for (const auto& tile : fastattn::kGemmSm90W4ManyRowsTiles) {
      if (size == 0 || 1000 + tile.block_m == size) choices.push_back({true, tile});
    }
    const Choice& choice = choices[seed % choices.size()];
    const bool takes_fp8 =
        choice.many_rows ||
        std::any_of(std::begin(fastattn::kGemmSm90W4Fp8Tiles), std::end(fastattn::kGemmSm90W4Fp8Tiles),
                    [&](const fastattn::GemmSm90Tile& tile) {
                      return tile.block_m == choice.tile.block_m && tile.block_n == choice.tile.block_n;
                    });
    if (takes_fp8 && one_in(2)) {
      const int group = pick({16, 32});
      return one_in(2) ? run_fp8_call<__half>(group, choice.many_rows, choice.tile)
                       : run_fp8_call<__nv_bfloat16>(group, choice.many_rows, choice.tile);
    }
    const Format& format = kFormats[between(0, 2)];
    if (one_in(2)) {
      run_call<__half>(format, choice.many_rows, choice.tile);
    } else {
      run_call<__nv_bfloat16>(format, choice.many_rows, choice.tile);
    }
  });
}
