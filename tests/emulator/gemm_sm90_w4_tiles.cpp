// Draws calls of the Hopper GEMMs for few rows, or up to 64, and weights of 4 bits in tiles, and holds their results
// against a reference.
#include "gemm/gemm_sm90_w4_tiles.h"

#include <algorithm>

#include "arch/e2m1.cuh"
#include "drawn_call.h"
#include "w4_tiles.h"

namespace {

using namespace emulator;
using fastattn::GemmSm90W4Params;
using fastattn::GemmSm90W4SomeRowsConfig;
using fastattn::GemmSm90W4TilesConfig;
using fastattn::GemmSm90W4TilesShape;

struct Format {
  const char* name;
  bool fours;  // tiles in order 8
  bool fp8;    // x in e4m3
  int group;   // 0: int4, of any size
  cudaError_t (*few_rows)(const GemmSm90W4Params&, const GemmSm90W4TilesConfig&, cudaStream_t);
  cudaError_t (*some_rows)(const GemmSm90W4Params&, const GemmSm90W4SomeRowsConfig&, cudaStream_t) = nullptr;
};
const Format kFormats[] = {
    {"nvfp4", false, false, 16, fastattn::gemm_nvfp4_tiles_sm90, fastattn::gemm_nvfp4_some_rows_sm90},
    {"mxfp4", false, false, 32, fastattn::gemm_mxfp4_tiles_sm90, fastattn::gemm_mxfp4_some_rows_sm90},
    {"int4", false, false, 0, fastattn::gemm_int4_tiles_sm90, fastattn::gemm_int4_some_rows_sm90},
    {"nvfp4 in fours", true, false, 16, fastattn::gemm_nvfp4_tiles_of_fours_sm90},
    {"mxfp4 in fours", true, false, 32, fastattn::gemm_mxfp4_tiles_of_fours_sm90},
    {"nvfp4 and fp8", true, true, 16, fastattn::gemm_nvfp4_fp8_tiles_sm90},
    {"mxfp4 and fp8", true, true, 32, fastattn::gemm_mxfp4_fp8_tiles_sm90}};
constexpr int kFormatsOfSomeRows = 3;

// X of x, T of out. shape: of few rows; of some block_m alone.
template <typename X, typename T>
void run_call(const Format& format, const GemmSm90W4TilesShape& shape, bool some_rows) {
  constexpr int kBehind = 64;  // elements behind out that nobody may write
  GemmSm90W4Params p;
  p.dtype = TypeInfo<T>::kDType;
  const int pass = shape.pass_tiles;
  p.m = pick({1, between(1, shape.block_m), shape.block_m});
  const bool more_passes = !some_rows && one_in(6);
  const bool many_row_tiles = some_rows && one_in(2);  // of a CTA: its groups do not share the columns
  p.n = 16 * (more_passes ? between(1, 5) : many_row_tiles ? between(9, 40) : pick({1, between(1, 8), between(1, 40)}));
  p.k = 64 * (more_passes      ? between(pass + 1, 2 * pass + 2)
              : many_row_tiles ? between(1, 24)
                               : pick({1, between(1, 12), between(1, some_rows ? 48 : 24)}));
  const int64_t most_splits = some_rows ? std::min<int64_t>((p.k / 64 + 3) / 4, 4) : p.k / 64;
  const int splits = static_cast<int>(std::min<int64_t>(most_splits, pick({1, 1, 2, 3, 8})));
  const int64_t num_sms = many_row_tiles ? 1 : pick<int64_t>({1, 20, 132});
  const GemmSm90W4TilesConfig few = fastattn::gemm_sm90_w4_tiles_of(shape, splits, p.n, num_sms);
  const GemmSm90W4SomeRowsConfig some = fastattn::gemm_sm90_w4_some_rows_of(shape.block_m, splits, p.n, num_sms);

  p.x_stride = p.k + 16 / sizeof(X) * pick({0, 0, 1, 5});
  Tensor<X> x(p.m * p.x_stride + 16);  // NaN between the rows
  const bool units = one_in(4);        // rows of x, which make single weights, exact ones
  for (int64_t m = 0; m < p.m; ++m) {
    const int64_t unit = between(0, static_cast<int>(p.k) - 1);
    for (int64_t k = 0; k < p.k; ++k) x.set(m * p.x_stride + k, units ? static_cast<float>(k == unit) : normal());
  }
  const int64_t columns = p.k / 64;
  const int64_t group = format.group != 0 ? format.group : pick<int64_t>({64, 128, 192, p.k});
  const int64_t num_groups = fastattn::ceil_div(p.k, group), of_tile = format.group != 0 ? 64 / group : 0;
  p.group_size = fastattn::FastDivide(static_cast<int32_t>(group));
  p.scale_stride = num_groups + pick({0, 0, 3});
  p.zero_point_stride = num_groups + pick({0, 3});
  const bool has_zero_points = format.group == 0 && one_in(2);
  std::vector<uint8_t> codes(p.n * p.k), scale_bits(p.n * num_groups);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(between(0, 15));
  Tensor<T> scales(format.group == 0 ? p.n * p.scale_stride : 0);  // NaN between the rows
  std::vector<int8_t> zero_points(p.n * p.zero_point_stride);
  std::vector<float> values(p.n * num_groups);  // of scales
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t g = 0; g < num_groups; ++g) {
      float& value = values[n * num_groups + g];
      if (format.group == 0) {
        scales.set(n * p.scale_stride + g, std::fabs(normal()) * 0.1f);
        value = scales.values[n * p.scale_stride + g];
        zero_points[n * p.zero_point_stride + g] = static_cast<int8_t>(has_zero_points ? between(-8, 7) : 0);
      } else {
        // Of MXFP4 none beyond 2^6, and in fp16 what its smallest number still holds.
        const int bits = format.group == 16 ? between(0, 126) | between(0, 1) << 7 : between(112, 133);
        scale_bits[n * num_groups + g] = static_cast<uint8_t>(bits);
        value = format.group == 16 ? fastattn::from_e4m3<float>(static_cast<uint8_t>(bits))
                                   : fastattn::from_e8m0<float>(static_cast<uint8_t>(bits));
      }
    }
  }
  const std::vector<uint32_t> tiles = tiles_of(p.n, p.k, format.fours ? 8 : 16,
                                               format.fours        ? fp8_word
                                               : format.group == 0 ? int4_word
                                                                   : fp4_word,
                                               [&](int64_t n, int64_t k) { return codes[n * p.k + k]; });
  const std::vector<uint8_t> scale_tiles =
      scale_tiles_of(p.n, p.k, of_tile, [&](int64_t n, int64_t g) { return scale_bits[n * num_groups + g]; });
  std::vector<float> global_scales(p.n);
  for (float& scale : global_scales) scale = 50.0f + static_cast<float>(between(0, 1000));
  Tensor<T> bias(p.n);
  for (int64_t n = 0; n < p.n; ++n) bias.set(n, normal());
  std::vector<T> out(p.m * p.n + kBehind, T(NAN));
  p.x = x.data.data();
  p.weight = tiles.data();
  p.weight_scale = format.group == 0 ? static_cast<const void*>(scales.data.data()) : scale_tiles.data();
  p.zero_point = has_zero_points ? zero_points.data() : nullptr;
  // Sums of thousands of 6 * 448 leave fp16.
  p.global_scale = !units && format.group != 0 && (format.group == 16 || one_in(2)) ? global_scales.data() : nullptr;
  p.bias = !units && one_in(2) ? bias.data.data() : nullptr;
  std::vector<float> x_scales(p.m, 1.0f);
  if (!units) {
    for (float& scale : x_scales) scale = std::exp2(normal());
  }
  p.x_scale = format.fp8 ? x_scales.data() : nullptr;
  p.x_scale_stride = one_in(4) ? 0 : 1;
  p.out = out.data();
  current_call += std::string(": ") + format.name + " " + TypeInfo<T>::kName + " m " + std::to_string(p.m) + ", n " +
                  std::to_string(p.n) + ", k " + std::to_string(p.k) + ", groups of " + std::to_string(group) +
                  (has_zero_points ? " with zero points" : "") + "; block " + std::to_string(shape.block_m) + " x " +
                  std::to_string(some_rows ? some.box_tiles : shape.row_tiles) + " tiles, " + std::to_string(splits) +
                  " splits, " + std::to_string(some_rows ? some.num_ctas : few.num_ctas) + " CTAs";

  std::vector<double> weight(p.n * p.k);
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.k; ++k) {
      const int code = codes[n * p.k + k];
      const int zero_point = zero_points[n * p.zero_point_stride + k / group];
      const float number = format.group == 0 ? static_cast<float>(code - 8 - zero_point) : e2m1_value(code);
      const float value = number * values[n * num_groups + k / group];
      weight[n * p.k + k] = format.fp8 ? value : static_cast<float>(T(value));  // with x in e4m3 no rounding
    }
  }
  const auto launch = [&] {
    const cudaError_t error = some_rows ? format.some_rows(p, some, nullptr) : format.few_rows(p, few, nullptr);
    if (error != cudaSuccess) fail("no instantiation takes the call");
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
      const double x_scale = format.fp8 ? x_scales[m * p.x_scale_stride] : 1.0;
      const double divisor = (p.global_scale == nullptr ? 1.0 : global_scales[n]) / x_scale;
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

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int size) {
    constexpr int NUM_SHAPES = std::size(fastattn::kGemmSm90W4TilesShapes);
    constexpr int NUM_BLOCKS = std::size(fastattn::kGemmSm90W4SomeRowsBlocks);
    std::vector<GemmSm90W4TilesShape> shapes(fastattn::kGemmSm90W4TilesShapes,
                                             fastattn::kGemmSm90W4TilesShapes + NUM_SHAPES);
    for (const int block_m : fastattn::kGemmSm90W4SomeRowsBlocks) shapes.push_back({block_m, 1, 1, 1});
    int idx = seed % (NUM_SHAPES + NUM_BLOCKS);
    for (int i = 0; i < NUM_SHAPES + NUM_BLOCKS; ++i) {
      if (shapes[i].block_m == size) idx = i;
    }
    const GemmSm90W4TilesShape& shape = shapes[idx];
    const bool some_rows = idx >= NUM_SHAPES;
    const Format& format =
        kFormats[between(0, some_rows ? kFormatsOfSomeRows - 1 : static_cast<int>(std::size(kFormats)) - 1)];
    if (format.fp8) {
      return one_in(2) ? run_call<__nv_fp8_e4m3, __half>(format, shape, false)
                       : run_call<__nv_fp8_e4m3, __nv_bfloat16>(format, shape, false);
    }
    return one_in(2) ? run_call<__half, __half>(format, shape, some_rows)
                     : run_call<__nv_bfloat16, __nv_bfloat16>(format, shape, some_rows);
  });
}
