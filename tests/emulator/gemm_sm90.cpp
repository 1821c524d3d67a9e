// Draws calls of the Hopper GEMMs and holds their results against a reference.
#include "gemm/gemm_sm90.h"

#include "drawn_call.h"

namespace {

using namespace emulator;
using fastattn::GemmSm90Config;
using fastattn::GemmSm90Params;

template <typename T>
void run_call(bool few_rows, const fastattn::GemmSm90Tile& tile) {
  constexpr int kBehind = 64;  // elements behind out that nobody may write
  GemmSm90Params p;
  p.dtype = TypeInfo<T>::kDType;
  GemmSm90Config& config = p.config;
  config.few_rows = few_rows;
  config.tile = tile;
  p.m = pick({1, between(1, tile.block_m), tile.block_m, between(1, 3 * tile.block_m)});
  p.n = 8 * between(1, 2 * tile.block_n / 8 + 3);
  p.k = pick({8, 64, 8 * between(1, 40), 8 * between(40, 120)});
  const int stage_k = 64 * (few_rows ? fastattn::gemm_sm90_few_rows_ring(tile).panels : 1);
  const int64_t num_steps = fastattn::ceil_div(p.k, stage_k);
  const int num_splits = few_rows ? static_cast<int>(std::min<int64_t>(num_steps, pick({1, 2, 3, 5, 8}))) : 1;
  set_gemm_sm90_grid(config, {p.m, p.n, p.k, pick<int64_t>({2, 4, 7, 132})}, num_splits);
  config.group_rows = pick({1, 2, 8});

  const auto draw_matrix = [](int64_t rows, int64_t columns, int64_t& stride) {
    stride = columns + 8 * pick({0, 0, 1, 5});
    Tensor<T> matrix(rows * stride + 8);  // NaN between the rows
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) matrix.set(row * stride + column, normal());
    }
    return matrix;
  };
  const Tensor<T> x = draw_matrix(p.m, p.k, p.x_stride), weight = draw_matrix(p.n, p.k, p.weight_stride);
  Tensor<T> bias(p.n);
  for (int64_t n = 0; n < p.n; ++n) bias.set(n, normal());
  std::vector<T> out(p.m * p.n + kBehind, T(NAN));
  p.x = x.data.data();
  p.weight = weight.data.data();
  p.bias = one_in(2) ? bias.data.data() : nullptr;
  p.out = out.data();
  current_call += std::string(": ") + TypeInfo<T>::kName + " m " + std::to_string(p.m) + ", n " + std::to_string(p.n) +
                  ", k " + std::to_string(p.k) + "; block " + std::to_string(tile.block_m) + " x " +
                  std::to_string(tile.block_n) + ", " + std::to_string(config.num_splits) + " splits, " +
                  std::to_string(config.num_ctas) + " CTAs";

  const auto launch = [&] {
    if (gemm_sm90(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = p.bias == nullptr ? 0.0 : bias.values[n], size = std::fabs(sum);
      for (int64_t k = 0; k < p.k; ++k) {
        const double term = double{x.values[m * p.x_stride + k]} * weight.values[n * p.weight_stride + k];
        sum += term;
        size += std::fabs(term);
      }
      const double got = static_cast<float>(out[m * p.n + n]);
      // Rounded once, from a sum in fp32.
      const double allowed = std::fabs(sum) * (std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7) + size * 0x1p-20 + 1e-6;
      if (!(std::fabs(got - sum) <= allowed)) {
        fail("out[" + std::to_string(m) + ", " + std::to_string(n) + "] is " + std::to_string(got) + ", expected " +
             std::to_string(sum));
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
    struct Choice {
      bool few_rows;
      fastattn::GemmSm90Tile tile;
    };
    std::vector<Choice> choices;
    for (const auto& tile : fastattn::kGemmSm90Tiles) choices.push_back({false, tile});
    for (const auto& tile : fastattn::kGemmSm90FewRowsTiles) choices.push_back({true, tile});
    const auto has_other_size = [&](const Choice& choice) { return size != 0 && choice.tile.block_m != size; };
    choices.erase(std::remove_if(choices.begin(), choices.end(), has_other_size), choices.end());
    const Choice& choice = choices[seed % choices.size()];
    if (one_in(2)) {
      run_call<__half>(choice.few_rows, choice.tile);
    } else {
      run_call<__nv_bfloat16>(choice.few_rows, choice.tile);
    }
  });
}
