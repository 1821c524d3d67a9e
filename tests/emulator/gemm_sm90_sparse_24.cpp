// Draws calls of the Hopper GEMM for 2:4 sparse weights and holds their results against a reference.
#include "gemm/gemm_sm90_sparse_24.h"

#include "drawn_call.h"

namespace {

using namespace emulator;
using fastattn::GemmSm90SparseParams;

// The word and the bit of the metadata of row n and columns 4 chunk and on: as the operator's documentation has it.
struct Place {
  int64_t word;
  int bit;
};
Place place_of(int64_t n, int64_t chunk, int64_t padded_k, int element_bytes) {
  const int64_t unit = chunk / 16;  // of 64 columns
  const int64_t row = n % 64, within = chunk % 16;
  const bool halves = element_bytes == 2;
  const int64_t quarter = halves ? within / 4 : within / 8 * 2 + row / 8 % 2;
  const int bit = static_cast<int>(halves ? row / 8 % 2 * 16 + within % 4 * 4 : within % 8 * 4);
  const int64_t thread = n % 128 / 64 * 128 + row / 16 * 32 + row % 8 * 4 + quarter;
  return {(n / 128 * (padded_k / 64) + unit) * 256 + thread, bit};
}

template <typename E, typename T>
void run_call(const fastattn::GemmSm90Tile& tile, bool fast_accum) {
  constexpr int kBehind = 64;  // elements behind out that nobody may write
  constexpr int kUnit = 16 / sizeof(E);
  constexpr bool kScaled = sizeof(E) == 1, kFp8 = std::is_same_v<E, __nv_fp8_e4m3>;
  GemmSm90SparseParams p;
  p.dtype = TypeInfo<T>::kDType;
  p.fast_accum = fast_accum;
  p.config.tile = tile;
  p.config.num_splits = 1;
  p.config.stream_k = one_in(2);
  p.m = pick({1, between(1, tile.block_m), tile.block_m, between(1, 3 * tile.block_m)});
  p.n = 8 * between(1, 2 * tile.block_n / 8 + 3);
  p.k = pick({2 * kUnit, 64, 2 * kUnit * between(1, 20), 2 * kUnit * between(20, 60)});
  const bool one_sign = kFp8 && one_in(2);  // long sums of positive numbers, which 14 bits do not hold
  if (one_sign && tile.block_m == 16) p.k *= 8;
  set_gemm_sm90_sparse_grid(p.config, {p.m, p.n, p.k, pick<int64_t>({2, 4, 7, 132}), sizeof(E), kFp8 && !fast_accum});
  p.config.group_rows = pick({1, 2, 8});
  const Workspaces workspaces(p);

  const auto value = [&] {
    const float drawn = std::is_same_v<E, int8_t> ? static_cast<float>(between(-127, 127)) : normal();
    return one_sign ? std::fabs(drawn) : drawn;
  };
  p.x_stride = p.k + kUnit * pick({0, 0, 1, 5});
  Tensor<E> x(p.m * p.x_stride + kUnit);  // NaN, or -128, between the rows
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t k = 0; k < p.k; ++k) x.set(m * p.x_stride + k, value());
  }
  p.weight_stride = p.k / 2 + kUnit * pick({0, 0, 1, 3});
  const int64_t padded_k = fastattn::ceil_div(p.k, 512) * 512;
  Tensor<E> stored(p.n * p.weight_stride + kUnit);
  std::vector<float> weight(p.n * p.k);
  std::vector<uint32_t> metadata(fastattn::ceil_div(p.n, 128) * (padded_k / 64) * 256, 0x44444444u);
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t chunk = 0; chunk < p.k / 4; ++chunk) {
      const int first = between(0, 2), second = between(first + 1, 3);
      const int places[2] = {first, second};
      for (int i = 0; i < 2; ++i) {
        const int64_t idx = n * p.weight_stride + chunk * 2 + i;
        stored.set(idx, value());
        weight[n * p.k + chunk * 4 + places[i]] = stored.values[idx];
      }
      const Place place = place_of(n, chunk, padded_k, sizeof(E));
      metadata[place.word] &= ~(15u << place.bit);
      metadata[place.word] |= static_cast<uint32_t>(first | second << 2) << place.bit;
    }
  }
  const auto draw_scales = [](int64_t rows, float size, int64_t& stride) {
    stride = one_in(4) ? 0 : 1;
    std::vector<float> scales(stride == 0 ? 1 : rows);
    for (float& scale : scales) scale = size * std::exp2(normal());
    return scales;
  };
  const std::vector<float> x_scale = draw_scales(p.m, std::is_same_v<E, int8_t> ? 1e-4f : 0.003f, p.x_scale_stride);
  const std::vector<float> weight_scale = draw_scales(p.n, 1.0f, p.weight_scale_stride);
  Tensor<T> bias(p.n);
  for (int64_t n = 0; n < p.n; ++n) bias.set(n, normal());
  std::vector<T> out(p.m * p.n + kBehind, T(NAN));
  p.x = x.data.data();
  p.weight = stored.data.data();
  p.metadata = metadata.data();
  p.bias = one_in(2) ? bias.data.data() : nullptr;
  p.out = out.data();
  p.x_scale = x_scale.data();
  p.weight_scale = weight_scale.data();
  current_call += std::string(": ") + TypeInfo<E>::kName + (fast_accum ? " fast" : "") + " to " + TypeInfo<T>::kName +
                  " m " + std::to_string(p.m) + ", n " + std::to_string(p.n) + ", k " + std::to_string(p.k) +
                  "; block " + std::to_string(tile.block_m) + (p.config.stream_k ? ", stream-K, " : ", ") +
                  std::to_string(p.config.num_ctas) + " CTAs";

  const auto launch = [&] {
    const cudaError_t error = kFp8      ? gemm_sparse_fp8_sm90(p, nullptr)
                              : kScaled ? gemm_sparse_int8_sm90(p, nullptr)
                                        : gemm_sparse_sm90(p, nullptr);
    if (error != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  // Of the magnitudes' sum: what fp32 loses; for fp8, 2^-13 at each product of 64 columns, of which four are added up.
  const int64_t num_products = fast_accum && tile.block_m >= 128 ? fastattn::ceil_div(p.k, 64) : 4;
  const double lost = kFp8 ? 0x1p-13 * static_cast<double>(num_products) : std::is_same_v<E, int8_t> ? 0.0 : 0x1p-20;
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < p.k; ++k) {
        const double term = double{x.values[m * p.x_stride + k]} * weight[n * p.k + k];
        sum += term;
        size += std::fabs(term);
      }
      const double scale =
          kScaled ? double{x_scale[m * p.x_scale_stride]} * weight_scale[n * p.weight_scale_stride] : 1.0;
      const double added = p.bias == nullptr ? 0.0 : bias.values[n];
      const double expected = sum * scale + added, got = static_cast<float>(out[m * p.n + n]);
      // Rounded once, from a sum in fp32.
      const double allowed = std::fabs(expected) * (std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7) +
                             size * scale * lost + (std::fabs(sum * scale) + std::fabs(added)) * 0x1p-20 + 1e-6;
      expect_near(m, n, got, expected, allowed);
    }
  }
  expect_untouched_behind(out, p.m * p.n);
  if (one_in(3)) expect_same_again(out, launch);
}

template <typename T>
void run_call_of_any(const fastattn::GemmSm90Tile& tile) {
  switch (between(0, 2)) {
    case 0:
      return run_call<int8_t, T>(tile, false);
    case 1:
      return run_call<__nv_fp8_e4m3, T>(tile, !gemm_sm90_sparse_has_tile(tile, true) || one_in(3));
    default:
      return run_call<T, T>(tile, false);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int size) {
    std::vector<fastattn::GemmSm90Tile> tiles;
    for (const auto& tile : fastattn::kGemmSm90SparseTiles) {
      if (size == 0 || tile.block_m == size) tiles.push_back(tile);
    }
    const fastattn::GemmSm90Tile& tile = tiles[seed % tiles.size()];
    one_in(2) ? run_call_of_any<__half>(tile) : run_call_of_any<__nv_bfloat16>(tile);
  });
}
