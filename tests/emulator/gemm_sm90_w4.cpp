// Draws calls of the Hopper GEMMs for weights of 4 bits and holds their results against a reference.
#include "gemm/gemm_sm90_w4.h"

#include "arch/e2m1.cuh"
#include "drawn_call.h"

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

float e2m1_value(int code) {
  constexpr float kValues[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return (code & 8 ? -1.0f : 1.0f) * kValues[code & 7];
}

template <typename T>
void run_call(const Format& format, const fastattn::GemmSm90Tile& tile) {
  constexpr int kBehind = 64;  // elements behind out that nobody may write
  GemmSm90W4Params p;
  p.dtype = TypeInfo<T>::kDType;
  GemmSm90W4Config& config = p.config;
  config.tile = tile;
  p.m = pick({1, between(1, tile.block_m), tile.block_m, between(1, 2 * tile.block_m)});
  p.n = 8 * between(1, 2 * tile.block_n / 8 + 3);
  p.k = 64 * pick({1, 4, between(1, 12), between(12, 40)});
  const int64_t num_steps = fastattn::ceil_div(p.k, fastattn::kGemmSm90W4StageK);
  set_gemm_sm90_w4_grid(config, {p.m, p.n, p.k, 4.5, 132},
                        static_cast<int>(std::min<int64_t>(num_steps, pick({1, 2, 3, 5, 8}))));

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
                  std::to_string(tile.block_n) + ", " + std::to_string(config.num_splits) + " splits, " +
                  std::to_string(config.num_ctas) + " CTAs";

  std::vector<double> weight(p.n * p.k);
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.k; ++k) {
      const int code = codes[n * p.weight_stride + k / 2] >> k % 2 * 4 & 15;
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
      if (!(std::fabs(got - expected) <= allowed)) {
        fail("out[" + std::to_string(m) + ", " + std::to_string(n) + "] is " + std::to_string(got) + ", expected " +
             std::to_string(expected));
      }
    }
  }
  for (int i = 0; i < kBehind; ++i) {
    if (!std::isnan(static_cast<float>(out[p.m * p.n + i]))) fail("a write behind the end of out");
  }
  if (!one_in(3)) return;
  const std::vector<T> first = out;
  std::fill(out.begin(), out.end(), T(NAN));
  launch();
  if (std::memcmp(first.data(), out.data(), first.size() * sizeof(T)) != 0) fail("two runs differ");
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int size) {
    std::vector<fastattn::GemmSm90Tile> tiles;
    for (const auto& tile : fastattn::kGemmSm90W4Tiles) {
      if (size == 0 || tile.block_m == size) tiles.push_back(tile);
    }
    const auto& tile = tiles[seed % tiles.size()];
    const Format& format = kFormats[between(0, 2)];
    if (one_in(2)) {
      run_call<__half>(format, tile);
    } else {
      run_call<__nv_bfloat16>(format, tile);
    }
  });
}
