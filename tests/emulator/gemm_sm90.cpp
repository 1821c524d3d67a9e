// Draws calls of the Hopper GEMMs and holds their results against a reference.
#include "gemm/gemm_sm90.h"

#include <functional>
#include <numeric>

#include "drawn_call.h"
#include "sampling/gumbel_max.cuh"
#include "sampling/gumbel_max.h"

namespace {

using namespace emulator;
using fastattn::GemmSm90Config;
using fastattn::GemmSm90Params;

using Norm = fastattn::GemmSm90Norm;
enum class Gate { kNone, kSilu, kGeluTanh };

double activated(Gate gate, double g) {
  if (gate == Gate::kSilu) return g / (1.0 + std::exp(-g));
  return g / (1.0 + std::exp(-2.0 * 0.79788456080286536 * (g + 0.044715 * g * g * g)));
}

template <typename E, typename T>
void run_call(bool few_rows, const fastattn::GemmSm90Tile& tile, bool fast_accum, Norm norm = Norm::kNone,
              Gate gate = Gate::kNone, bool blocks = false) {
  constexpr int kBehind = 64;  // elements behind out that nobody may write
  constexpr int kUnit = 16 / sizeof(E);
  constexpr bool kScaled = sizeof(E) == 1, kFp8 = std::is_same_v<E, __nv_fp8_e4m3>;
  constexpr int64_t kBlock = 128;  // rows of weight, and columns, that share a scale
  GemmSm90Params p;
  p.dtype = TypeInfo<T>::kDType;
  p.fast_accum = fast_accum;
  GemmSm90Config& config = p.config;
  config.few_rows = few_rows;
  config.tile = tile;
  p.m = pick({1, between(1, tile.block_m), tile.block_m, between(1, 3 * tile.block_m)});
  const int per_column = gate == Gate::kNone ? 1 : 2;  // rows of weight for a column of out
  p.n = 8 * per_column * between(1, (2 * tile.block_n / 8 + 3) / per_column);
  if (tile.turns) p.n += tile.block_n;  // tiles enough for turns
  p.k = pick({kUnit, 64, kUnit * between(1, 40), kUnit * between(40, 120)});
  // Long sums of positive numbers, which 14 bits do not hold.
  const bool one_sign = kFp8 && one_in(2);
  if (one_sign && few_rows && tile.block_m == 8) p.k *= 8;
  const int stage_k =
      static_cast<int>(128 / sizeof(E)) * (few_rows ? fastattn::gemm_sm90_few_rows_ring(tile).panels : 1);
  const int64_t num_steps = fastattn::ceil_div(p.k, stage_k);
  const int num_splits =
      few_rows && !tile.in_order ? static_cast<int>(std::min<int64_t>(num_steps, pick({1, 2, 3, 5, 8}))) : 1;
  if (tile.in_order || (few_rows && !blocks && one_in(2))) {
    config.weight_rows = 8 * per_column * between(1, tile.block_n / (8 * per_column));
  }
  const int64_t num_sms = tile.turns ? pick<int64_t>({2, 2, 4}) : pick<int64_t>({2, 4, 7, 132});
  const bool two_levels = kFp8 && !fast_accum;
  config.stream_k = !few_rows && gemm_sm90_streams(tile, two_levels, gate != Gate::kNone) && one_in(2);
  config.gives_norms = few_rows && one_in(2);
  set_gemm_sm90_grid(config, {p.m, p.n, p.k, num_sms, sizeof(E), two_levels, norm}, num_splits);
  config.group_rows = pick({1, 2, 8});
  const Workspaces workspaces(p);
  std::vector<float2> row_norms(config.num_row_norms, float2{NAN, NAN});
  p.row_norms = row_norms.data();

  const auto draw_matrix = [&](int64_t rows, int64_t columns, int64_t& stride, float mean, float size) {
    stride = columns + kUnit * pick({0, 0, 1, 5});
    Tensor<E> matrix(rows * stride + kUnit);  // NaN, or -128, between the rows
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const float value = std::is_same_v<E, int8_t> ? static_cast<float>(between(-127, 127)) : mean + size * normal();
        matrix.set(row * stride + column, one_sign ? std::fabs(value) : value);
      }
    }
    return matrix;
  };
  // A mean that squares in fp32 would leave little of the variance of.
  const float x_mean = norm == Norm::kLayer ? pick({0.0f, -3.0f, 100.0f, 1000.0f}) : 0.0f;
  const Tensor<E> x = draw_matrix(p.m, p.k, p.x_stride, x_mean, 1.0f);
  // Gates of all sizes, and such as are open or shut.
  const float weight_size = gate != Gate::kNone && !one_in(4) ? 1.0f / std::sqrt(static_cast<float>(p.k)) : 1.0f;
  const Tensor<E> weight = draw_matrix(p.n, p.k, p.weight_stride, 0.0f, weight_size);
  const auto draw_scales = [](int64_t rows, float size, int64_t& stride) {
    stride = one_in(4) ? 0 : 1;
    std::vector<float> scales(stride == 0 ? 1 : rows);
    for (float& scale : scales) scale = size * std::exp2(normal());
    return scales;
  };
  // Sums of int8 are large, and must not leave fp16; of gates two are multiplied.
  const float of_gates = gate == Gate::kNone ? 1.0f : 0.05f;
  std::vector<float> x_scale =
      draw_scales(p.m, of_gates * (std::is_same_v<E, int8_t> ? 1e-4f : 0.003f), p.x_scale_stride);
  std::vector<float> weight_scale = draw_scales(p.n, 1.0f, p.weight_scale_stride);
  if (blocks) {
    const auto draw_block_scales = [](int64_t rows, int64_t columns, float size, int64_t& stride) {
      stride = columns + pick({0, 3});
      std::vector<float> scales((rows - 1) * stride + columns, NAN);
      for (int64_t i = 0; i < rows * columns; ++i) {
        scales[i / columns * stride + i % columns] = size * std::exp2(2.0f * normal());
      }
      return scales;
    };
    const int64_t panels = fastattn::ceil_div(p.k, kBlock);
    x_scale = draw_block_scales(panels, p.m, 0.003f, p.x_scale_stride);
    weight_scale = draw_block_scales(fastattn::ceil_div(p.n, kBlock), panels, 1.0f, p.weight_scale_stride);
  }
  Tensor<T> bias(p.n);
  for (int64_t n = 0; n < p.n; ++n) bias.set(n, normal());
  const int64_t width = p.n / per_column;
  std::vector<T> out(p.m * width + kBehind, T(NAN));
  p.x = x.data.data();
  p.weight = weight.data.data();
  p.bias = one_in(2) ? bias.data.data() : nullptr;
  p.out = out.data();
  if (kScaled) {
    p.x_scale = x_scale.data();
    p.weight_scale = weight_scale.data();
  }
  const bool zero_points =
      std::is_same_v<E, int8_t> && (few_rows || fastattn::gemm_sm90_has_zero_points(tile.block_n)) && one_in(2);
  std::vector<int32_t> x_zero_point(x_scale.size(), 0), code_sum(p.n);
  if (zero_points) {
    for (int32_t& zero_point : x_zero_point) zero_point = between(-128, 127);
    for (int64_t n = 0; n < p.n; ++n) {
      const float* const row = weight.values.data() + n * p.weight_stride;
      code_sum[n] = static_cast<int32_t>(std::accumulate(row, row + p.k, 0.0));
    }
    p.x_zero_point = x_zero_point.data();
    p.weight_code_sum = code_sum.data();
  }
  p.eps = pick({1e-6f, 0.5f});
  std::vector<float> weight_sum(p.n);
  for (int64_t n = 0; n < p.n; ++n) {
    const float* const row = weight.values.data() + n * p.weight_stride;
    weight_sum[n] = static_cast<float>(std::accumulate(row, row + p.k, 0.0));
  }
  if (norm == Norm::kLayer) p.weight_sum = weight_sum.data();
  // Not those of x, so that a kernel that adds up others is found out.
  const int64_t num_parts = fastattn::gemm_sm90_squares_parts(p.k);
  std::vector<float> x_squares(p.m * num_parts);
  for (float& squares : x_squares) squares = 64.0f * std::exp2(normal());
  if (norm == Norm::kRmsGiven) p.x_squares = x_squares.data();
  if (gate == Gate::kSilu) set_silu_gate(p);
  if (gate == Gate::kGeluTanh) set_gelu_tanh_gate(p);
  const char* const norm_name = norm == Norm::kRms        ? "RMSNorm of "
                                : norm == Norm::kLayer    ? "LayerNorm of "
                                : norm == Norm::kRmsGiven ? "RMSNorm, squares given, of "
                                                          : "";
  const char* const gate_name = gate == Gate::kSilu ? "SiLU of " : gate == Gate::kGeluTanh ? "GeLU of " : "";
  current_call +=
      std::string(": ") + gate_name + norm_name + TypeInfo<E>::kName + (fast_accum ? " fast" : "") +
      (blocks ? " in blocks" : "") + (zero_points ? " with zero points" : "") + " to " + TypeInfo<T>::kName + " m " +
      std::to_string(p.m) + ", n " + std::to_string(p.n) + ", k " + std::to_string(p.k) + "; block " +
      std::to_string(tile.block_m) + " x " + std::to_string(tile.block_n) + (tile.turns ? " in turns, " : ", ") +
      (few_rows ? std::to_string(config.weight_rows) + (tile.in_order ? " rows in order, " : " rows, ") : "") +
      (config.stream_k ? "stream-K, " : "") + std::to_string(config.num_splits) + " splits, " +
      std::to_string(config.num_ctas) + " CTAs";

  const auto launch = [&] {
    const bool gated = gate != Gate::kNone;
    const cudaError_t error =
        blocks    ? gemm_fp8_blocks_sm90(p, nullptr)
        : kFp8    ? (gated ? fastattn::gemm_gated_fp8_sm90 : fastattn::gemm_fp8_sm90)(p, nullptr)
        : kScaled ? (gated ? fastattn::gemm_gated_int8_sm90 : fastattn::gemm_int8_sm90)(p, nullptr)
        : gated   ? (norm != Norm::kNone ? fastattn::gemm_rms_norm_gated_sm90 : fastattn::gemm_gated_sm90)(p, nullptr)
        : norm == Norm::kLayer ? gemm_layer_norm_sm90(p, nullptr)
        : norm != Norm::kNone  ? gemm_rms_norm_sm90(p, nullptr)
                               : gemm_sm90(p, nullptr);
    if (error != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  // Of the magnitudes' sum: what fp32 loses; for fp8, 2^-13 at each product of 32 columns, of which four are added up.
  const int64_t num_products = fast_accum && !few_rows ? fastattn::ceil_div(p.k, 32) : 4;
  const double lost = kFp8 ? 0x1p-13 * static_cast<double>(num_products) : std::is_same_v<E, int8_t> ? 0.0 : 0x1p-20;
  for (int64_t m = 0; m < p.m; ++m) {
    const float* const row = x.values.data() + m * p.x_stride;
    const double num_columns = static_cast<double>(p.k);
    const double mean = norm == Norm::kLayer ? std::accumulate(row, row + p.k, 0.0) / num_columns
                        : zero_points        ? x_zero_point[m * p.x_scale_stride]
                                             : 0.0;
    double squares = 0.0;
    for (int64_t k = 0; k < p.k; ++k) squares += (row[k] - mean) * (row[k] - mean);
    if (norm == Norm::kRmsGiven) {
      const float* const given = x_squares.data() + m * num_parts;
      squares = std::accumulate(given, given + num_parts, 0.0);
    }
    const double norm_scale = norm == Norm::kNone ? 1.0 : 1.0 / std::sqrt(squares / num_columns + p.eps);
    struct Sum {
      double value, allowed;  // what fp32 may be off
    };
    const auto sum_of = [&](int64_t n) -> Sum {
      double sum = 0.0, size = 0.0;
      for (int64_t k = 0; k < p.k; ++k) {
        double column = weight.values[n * p.weight_stride + k];
        if (blocks) {
          column *= double{x_scale[k / kBlock * p.x_scale_stride + m]} *
                    weight_scale[n / kBlock * p.weight_scale_stride + k / kBlock];
        }
        sum += (row[k] - mean) * column;
        size += std::fabs(row[k] * column);
      }
      const double scale = kScaled && !blocks
                               ? double{x_scale[m * p.x_scale_stride]} * weight_scale[n * p.weight_scale_stride]
                               : norm_scale;
      const double added = p.bias == nullptr ? 0.0 : bias.values[n];
      return {sum * scale + added, size * scale * lost + (std::fabs(sum * scale) + std::fabs(added)) * 0x1p-20};
    };
    for (int64_t n = 0; n < width; ++n) {
      Sum expected;
      if (gate == Gate::kNone) {
        expected = sum_of(n);
      } else {  // eight gates, then their eight ups
        const int64_t weight_row = n / 8 * 16 + n % 8;
        const Sum of_gate = sum_of(weight_row), of_up = sum_of(weight_row + 8);
        const double act = activated(gate, of_gate.value);
        expected = {act * of_up.value, 1.2 * of_gate.allowed * std::fabs(of_up.value) +
                                           std::fabs(act) * (of_up.allowed + std::fabs(of_up.value) * 0x1p-16)};
      }
      const double got = static_cast<float>(out[m * width + n]);
      // Rounded once, from a sum in fp32.
      const double allowed =
          std::fabs(expected.value) * (std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7) + expected.allowed + 1e-6;
      if (!(std::fabs(got - expected.value) <= allowed)) {
        fail("out[" + std::to_string(m) + ", " + std::to_string(n) + "] is " + std::to_string(got) + ", expected " +
             std::to_string(expected.value));
      }
    }
  }
  expect_untouched_behind(out, p.m * width);
  if (one_in(3)) expect_same_again(out, launch);
}

// A call whose sums are of integers, and exact, so that results are known to the last bit.
template <typename T>
struct ExactCall {
  Tensor<T> x, weight, bias;

  ExactCall(bool few_rows, const fastattn::GemmSm90Tile& tile, GemmSm90Params& p, bool shares_weight = false) {
    p.dtype = TypeInfo<T>::kDType;
    p.config.few_rows = few_rows;
    p.config.tile = tile;
    p.config.stream_k = !few_rows && gemm_sm90_streams(tile, false, false) && one_in(2);
    if (shares_weight && one_in(2)) p.config.weight_rows = 8 * between(1, tile.block_n / 8);
    p.m = pick({1, between(1, tile.block_m), tile.block_m, between(1, 2 * tile.block_m)});
    p.n = 8 * between(1, 3 * tile.block_n / 8);
    p.k = 8 * between(1, 60);
    const int64_t num_steps = fastattn::ceil_div(p.k, 64 * fastattn::gemm_sm90_few_rows_ring(tile).panels);
    const int num_splits = few_rows ? static_cast<int>(std::min<int64_t>(num_steps, pick({1, 1, 2, 5}))) : 1;
    set_gemm_sm90_grid(p.config, {p.m, p.n, p.k, few_rows ? 132 : pick<int64_t>({2, 4, 7})}, num_splits);
    x = draw_matrix(p.m, p.k, p.x_stride);
    weight = draw_matrix(p.n, p.k, p.weight_stride);
    bias = Tensor<T>(p.n);
    for (int64_t n = 0; n < p.n; ++n) bias.set(n, static_cast<float>(between(-3, 3)));
    p.bias = one_in(2) ? bias.data.data() : nullptr;
    current_call += std::string(": ") + TypeInfo<T>::kName + " m " + std::to_string(p.m) + ", n " +
                    std::to_string(p.n) + ", k " + std::to_string(p.k) + "; block " + std::to_string(tile.block_m) +
                    " x " + std::to_string(tile.block_n) + (tile.turns ? " in turns, " : ", ") +
                    (p.config.stream_k ? "stream-K, " : "") + std::to_string(num_splits) + " splits";
  }

  static Tensor<T> draw_matrix(int64_t rows, int64_t columns, int64_t& stride) {
    stride = columns + 8 * pick({0, 1, 5});
    Tensor<T> matrix(rows * stride + 8);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const int value = between(-2, 2);
      matrix.set(i / columns * stride + i % columns, static_cast<float>(value == 0 ? 3 : value));
    }
    return matrix;
  }

  void take(GemmSm90Params& p) const {
    p.x = x.data.data();
    p.weight = weight.data.data();
  }

  float sum(const GemmSm90Params& p, int64_t m, int64_t n) const {
    float sum = p.bias == nullptr ? 0.0f : bias.values[n];
    for (int64_t k = 0; k < p.k; ++k) sum += x.values[m * p.x_stride + k] * weight.values[n * p.weight_stride + k];
    return sum;
  }
};

// A product with a residual, which is rounded once, and the squares of what it gives.
template <typename T>
void run_added_call(bool few_rows, const fastattn::GemmSm90Tile& tile) {
  constexpr int kBehind = 16;
  fastattn::GemmSm90AddedParams p;
  const ExactCall<T> call(few_rows, tile, p);
  call.take(p);
  const Workspaces workspaces(p);
  Tensor<T> residual = ExactCall<T>::draw_matrix(p.m, p.n, p.residual_stride);
  for (float& value : residual.values) value *= 0.25f;
  for (size_t i = 0; i < residual.values.size(); ++i) residual.data[i] = T(residual.values[i]);
  std::vector<T> out(p.m * p.n + kBehind, T(NAN));
  const int64_t num_parts = fastattn::gemm_sm90_squares_parts(p.n);
  std::vector<float> squares(p.m * num_parts + kBehind, NAN);
  p.residual = residual.data.data();
  p.out = out.data();
  p.squares = one_in(3) ? nullptr : squares.data();
  current_call += " and a residual";
  if (gemm_added_sm90(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  for (int64_t i = 0; i < p.m * p.n; ++i) {
    const float sum = call.sum(p, i / p.n, i % p.n) + residual.values[i / p.n * p.residual_stride + i % p.n];
    const float expected = static_cast<float>(static_cast<T>(sum)), got = static_cast<float>(out[i]);
    if (got != expected) {
      fail("out[" + std::to_string(i / p.n) + ", " + std::to_string(i % p.n) + "] is " + std::to_string(got) +
           ", expected " + std::to_string(expected));
    }
  }
  for (int i = 0; i < kBehind; ++i) {
    if (!std::isnan(static_cast<float>(out[p.m * p.n + i]))) fail("a write behind the end of out");
    if (!std::isnan(squares[p.m * num_parts + i])) fail("a write behind the end of squares");
  }
  for (int64_t i = 0; p.squares != nullptr && i < p.m * num_parts; ++i) {
    const int64_t row = i / num_parts, first = i % num_parts * fastattn::kGemmSm90SquaresPart;
    double expected = 0.0;
    for (int64_t n = first; n < std::min(p.n, first + fastattn::kGemmSm90SquaresPart); ++n) {
      expected += std::pow(static_cast<double>(static_cast<float>(out[row * p.n + n])), 2);
    }
    if (!(std::fabs(squares[i] - expected) <= expected * 0x1p-20)) {
      fail("squares[" + std::to_string(row) + ", " + std::to_string(i % num_parts) + "] is " +
           std::to_string(squares[i]) + ", expected " + std::to_string(expected));
    }
  }
}

// A head that draws tokens. Many logits are equal, and some are none.
template <typename T>
void run_sampled_call(const fastattn::GemmSm90Tile& tile) {
  constexpr uint64_t kUntouched = 0x7ff8dead7ff8dead;
  constexpr int kBehind = 16;
  fastattn::GemmSm90SampledParams p;
  ExactCall<T> call(true, tile, p, true);
  const auto any_of = [](int64_t count) { return between(0, static_cast<int>(count) - 1); };
  if (one_in(3)) call.x.set(any_of(p.m) * p.x_stride, pick({NAN, INFINITY}));  // -1 for this row
  if (one_in(3)) call.weight.set(any_of(p.n) * p.weight_stride, INFINITY);     // of a token
  call.take(p);
  std::vector<float> temperature(p.m);
  std::vector<int64_t> seed(p.m), position(p.m);
  for (int64_t m = 0; m < p.m; ++m) {
    temperature[m] = pick({0.0f, 1.0f, 5.0f, 3e38f});
    seed[m] = between(-5, 5) * (int64_t{1} << between(0, 40));
    position[m] = between(0, 100) * (int64_t{1} << between(0, 40));
  }
  std::vector<uint64_t> choices(p.m * p.config.n_tiles + kBehind, kUntouched);
  std::vector<int32_t> token_ids(p.m, -7);
  std::vector<float> scores(p.m);
  p.temperature = temperature.data();
  p.seed = seed.data();
  p.position = position.data();
  p.choices = choices.data();
  p.first_id = 4 * between(0, 1000);
  current_call += " to tokens";
  fastattn::GumbelMaxParams best;
  best.choices = p.choices;
  best.token_ids = token_ids.data();
  best.scores = scores.data();
  best.num_rows = p.m;
  best.num_parts = p.config.n_tiles;
  if (gemm_sampled_sm90(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  if (best_choices(best, nullptr) != cudaSuccess) fail("best_choices does not take the call");

  for (int64_t m = 0; m < p.m; ++m) {
    int32_t expected = -1;
    float best_score = -INFINITY;
    bool has_nan = false, has_finite = false;
    for (int64_t n = 0; n < p.n; ++n) {
      const float logit = static_cast<float>(static_cast<T>(call.sum(p, m, n)));
      const int32_t id = p.first_id + static_cast<int32_t>(n);
      const uint4 words = fastattn::philox_words(seed[m], position[m], id / 4, 1);
      const uint32_t word = id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w;
      const float noise = temperature[m] == 0.0f ? 0.0f : fastattn::GumbelRow::noise(word);
      const float score = std::fma(std::min(temperature[m], 1e36f), noise, logit);
      has_nan |= std::isnan(logit);
      has_finite |= std::isfinite(logit);
      if (score > best_score) expected = id;
      best_score = std::max(best_score, score);
    }
    const bool has_token = !has_nan && has_finite;
    if (token_ids[m] != (has_token ? expected : -1)) {
      fail("token of row " + std::to_string(m) + " is " + std::to_string(token_ids[m]) + ", expected " +
           std::to_string(has_token ? expected : -1));
    }
    if (has_token && scores[m] != best_score) {
      fail("score of row " + std::to_string(m) + " is " + std::to_string(scores[m]) + ", expected " +
           std::to_string(best_score));
    }
  }
  for (int i = 0; i < kBehind; ++i) {
    if (choices[p.m * p.config.n_tiles + i] != kUntouched) fail("a write behind the end of choices");
  }
}

template <typename T>
void run_call_of_any(bool few_rows, const fastattn::GemmSm90Tile& tile) {
  if (tile.in_order) {
    if (one_in(3)) return run_call<__nv_fp8_e4m3, T>(few_rows, tile, false);
    return run_call<T, T>(few_rows, tile, false, Norm::kNone, pick({Gate::kNone, Gate::kSilu, Gate::kGeluTanh}));
  }
  struct Kinds {  // of products that a tile of many rows has
    bool two_levels = false, gated = false, block_scales = false, narrow = true;
  };
  const auto has = [&](const Kinds& kinds) {
    return few_rows || fastattn::gemm_sm90_has_tile(tile, kinds.two_levels, kinds.gated, kinds.block_scales, false,
                                                    false, kinds.narrow);
  };
  const auto run_half = [&](Norm norm, Gate gate) { run_call<T, T>(few_rows, tile, false, norm, gate); };
  const auto run_fp8 = [&](bool fast_accum, bool blocks) {
    run_call<__nv_fp8_e4m3, T>(few_rows, tile, fast_accum, Norm::kNone, Gate::kNone, blocks);
  };
  std::vector<std::function<void()>> calls;
  const auto add = [&](bool is_there, auto call) {
    if (is_there) calls.push_back(call);
  };
  add(has({}), [&] { run_call<int8_t, T>(few_rows, tile, false); });
  add(has({}), [&] { run_half(Norm::kNone, Gate::kNone); });
  add(has({}), [&] { run_half(Norm::kRmsGiven, Gate::kNone); });
  add(has({}), [&] { run_half(one_in(2) ? Norm::kRms : Norm::kLayer, Gate::kNone); });
  add(has({.gated = true}),
      [&] { run_half(pick({Norm::kRms, Norm::kNone, Norm::kRmsGiven}), one_in(2) ? Gate::kSilu : Gate::kGeluTanh); });
  add(has({.two_levels = true}), [&] { run_fp8(false, false); });
  add(has({.narrow = false}), [&] { run_fp8(true, false); });
  const bool has_blocks =
      few_rows ? fastattn::gemm_sm90_has_few_rows_tile(tile, true) : has({.two_levels = true, .block_scales = true});
  add(has_blocks, [&] { run_fp8(false, true); });
  calls[between(0, static_cast<int>(calls.size()) - 1)]();
}

// Of a tile that has gates.
template <typename T>
void run_gated_8_bit_call(bool few_rows, const fastattn::GemmSm90Tile& tile) {
  const Gate gate = one_in(2) ? Gate::kSilu : Gate::kGeluTanh;
  if (one_in(2)) return run_call<int8_t, T>(few_rows, tile, false, Norm::kNone, gate);
  const bool has_two_levels = few_rows || fastattn::gemm_sm90_has_tile(tile, true, true);
  run_call<__nv_fp8_e4m3, T>(few_rows, tile, !has_two_levels || one_in(3), Norm::kNone, gate);
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
    for (const auto& tile : fastattn::kGemmSm90InOrderTiles) choices.push_back({true, tile});
    // In place of a tile's rows: those with turns, and so on; the last, gates of products in 8 bits.
    constexpr int kTurns = 1, kStreams = 2, kInOrder = 3, kGates = 4;
    const auto has_other_size = [&](const Choice& choice) {
      if (size == kStreams) return choice.few_rows || !fastattn::gemm_sm90_streams(choice.tile, false, false);
      if (size == kGates) {
        return choice.tile.in_order || !(choice.few_rows || (fastattn::gemm_sm90_has_tile(choice.tile, false, true) &&
                                                             fastattn::gemm_sm90_has_8_bit_gates(choice.tile)));
      }
      const int own = choice.tile.turns ? kTurns : choice.tile.in_order ? kInOrder : choice.tile.block_m;
      return size != 0 && own != size;
    };
    choices.erase(std::remove_if(choices.begin(), choices.end(), has_other_size), choices.end());
    const Choice& choice = choices[seed % choices.size()];
    const bool few_rows = choice.few_rows;
    if (size == kGates) {
      return one_in(2) ? run_gated_8_bit_call<__half>(few_rows, choice.tile)
                       : run_gated_8_bit_call<__nv_bfloat16>(few_rows, choice.tile);
    }
    const bool adds =
        few_rows ? !choice.tile.in_order : fastattn::gemm_sm90_has_tile(choice.tile, false, false, false, false, true);
    if (adds && seed / choices.size() % 3 == 2) {
      const bool samples = few_rows && choice.tile.block_m <= fastattn::kGemmSm90MostSampledRows && !one_in(3);
      if (one_in(2)) {
        samples ? run_sampled_call<__half>(choice.tile) : run_added_call<__half>(few_rows, choice.tile);
      } else {
        samples ? run_sampled_call<__nv_bfloat16>(choice.tile) : run_added_call<__nv_bfloat16>(few_rows, choice.tile);
      }
    } else if (one_in(2)) {
      run_call_of_any<__half>(choice.few_rows, choice.tile);
    } else {
      run_call_of_any<__nv_bfloat16>(choice.few_rows, choice.tile);
    }
  });
}
