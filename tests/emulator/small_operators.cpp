// Draws calls of the norms, the gated activations, the embedding and what is done with logits before a token is drawn,
// and holds every value that they leave against loops in fp64; rows in 8 bits against those of 16 that another call
// leaves, bit by bit. SIZE: one operator, 1 to 7.
#include <cmath>

#include "drawn_call.h"
#include "elementwise/embedding.h"
#include "elementwise/gated_activation.h"
#include "elementwise/quantize_rows.h"
#include "norm/layer_norm.h"
#include "norm/rms_norm.h"
#include "sampling/adjust_logits.h"
#include "sampling/apply_token_bitmask.h"

namespace {

using namespace emulator;
using fastattn::Rows;

// Rows of a tensor, perhaps in two runs, perhaps with gaps that must stay as they are, perhaps not on 16 bytes.
template <typename T>
struct Matrix {
  std::vector<T> memory;
  Rows rows;
  int64_t num_rows, row_size;
  int first;

  Matrix(int64_t num_rows_, int64_t row_size_) : num_rows(num_rows_), row_size(row_size_), first(pick({0, 0, 0, 1})) {
    const int64_t inner_stride = row_size + pick({0, 0, 8, 5});
    const int64_t inner = num_rows % 2 == 0 && one_in(3) ? num_rows / 2 : num_rows;
    rows = Rows(inner, inner * inner_stride + pick({0, 16}), inner_stride);
    memory.resize(first + rows.outer_stride * (num_rows / inner) + 8);
    for (T& value : memory) value = T(normal());
  }
  T* data() { return memory.data() + first; }
  int64_t at(int64_t row, int64_t column) const { return first + rows.offset(static_cast<int32_t>(row)) + column; }
  double operator()(int64_t row, int64_t column) const { return static_cast<float>(memory[at(row, column)]); }
};

template <typename T>
std::vector<T> normals(int64_t size) {
  std::vector<T> values(size);
  for (T& value : values) value = T(normal());
  return values;
}

void expect(double got, double expected, double tolerance, int64_t row, int64_t column) {
  if (std::abs(got - expected) <= tolerance * std::max(1.0, std::abs(expected))) return;
  fail("row " + std::to_string(row) + ", column " + std::to_string(column) + ": " + std::to_string(got) +
       ", expected " + std::to_string(expected));
}

template <typename T>
constexpr double kRounding = std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;

// Lengths of all launches: a warp with gaps, one vector a thread, two, and longer than the registers.
int64_t draw_row_size() {
  if (one_in(40)) return 16384 + 8 * between(1, 40);
  if (one_in(6)) return 1000 + between(0, 600);
  return 8 * pick({between(1, 40), between(1, 40), between(250, 300), between(500, 560), between(900, 1100)});
}
int64_t draw_num_rows() { return pick({1, 2, 4, one_in(10) ? 300 : 3}); }

template <typename T>
void call_norm(bool layer) {
  int64_t row_size = draw_row_size();
  const int64_t num_rows = row_size > 2048 ? between(1, 4) : draw_num_rows();
  if (num_rows > 100) row_size = std::min<int64_t>(row_size, 320);
  Matrix<T> x(num_rows, row_size), residual(num_rows, row_size);
  const std::vector<T> weight = normals<T>(row_size), bias = normals<T>(row_size);
  std::vector<T> out(num_rows * row_size, T(NAN));
  const bool add = !layer && one_in(2), has_weight = !one_in(4), has_bias = layer && one_in(2);
  const float eps = 1e-5f;
  if (layer && one_in(3)) {  // a large mean
    for (T& value : x.memory) value = T(static_cast<float>(value) + 64.0f);
  }
  current_call += std::string(layer ? ": layer_norm"
                              : add ? ": add_rms_norm"
                                    : ": rms_norm") +
                  " of " + std::to_string(num_rows) + " x " + std::to_string(row_size) +
                  (has_weight ? "" : ", no weight");
  const Matrix<T> before = residual;
  const auto run = [&](int64_t num, T* target) {
    const auto set = [&](auto p) {
      p.x = x.data();
      p.x_rows = x.rows;
      p.weight = has_weight ? weight.data() : nullptr;
      p.out = target;
      p.num_rows = num;
      p.row_size = row_size;
      p.eps = eps;
      p.dtype = TypeInfo<T>::kDType;
      return p;
    };
    cudaError_t error;
    if (layer) {
      fastattn::LayerNormParams p = set(fastattn::LayerNormParams());
      p.bias = has_bias ? bias.data() : nullptr;
      error = layer_norm(p, nullptr);
    } else {
      fastattn::RmsNormParams p = set(fastattn::RmsNormParams());
      p.residual = add ? residual.data() : nullptr;
      p.residual_rows = residual.rows;
      error = rms_norm(p, nullptr);
    }
    if (error != cudaSuccess) fail("the call is refused");
  };
  std::vector<T> alone(row_size, T(NAN));
  run(1, alone.data());
  residual = before;
  run(num_rows, out.data());

  std::vector<T> expected_residual = before.memory;
  for (int64_t row = 0; row < num_rows; ++row) {
    std::vector<double> h(row_size);
    double sum = 0, square_sum = 0;
    for (int64_t i = 0; i < row_size; ++i) {
      h[i] = x(row, i);
      if (add) {
        const T rounded = T(static_cast<float>(h[i] + before(row, i)));
        expected_residual[before.at(row, i)] = rounded;
        h[i] = static_cast<float>(rounded);
      }
      sum += h[i];
    }
    const double mean = layer ? sum / row_size : 0.0;
    for (double value : h) square_sum += (value - mean) * (value - mean);
    const double scale = 1.0 / std::sqrt(square_sum / row_size + eps);
    for (int64_t i = 0; i < row_size; ++i) {
      const double expected = (h[i] - mean) * scale * (has_weight ? static_cast<float>(weight[i]) : 1.0) +
                              (has_bias ? static_cast<float>(bias[i]) : 0.0);
      expect(static_cast<float>(out[row * row_size + i]), expected, kRounding<T>, row, i);
    }
  }
  if (std::memcmp(residual.memory.data(), expected_residual.data(), expected_residual.size() * sizeof(T)) != 0) {
    fail("residual is not what is expected");
  }
  if (std::memcmp(alone.data(), out.data(), row_size * sizeof(T)) != 0) fail("a row alone has other bits");
}

template <typename T>
void call_gated() {
  const int64_t width = pick({int64_t{1}, int64_t{5}, draw_row_size()}), num_rows = between(1, 4);
  Matrix<T> x(num_rows, 2 * width);
  std::vector<T> out(num_rows * width, T(NAN));
  fastattn::GatedActivationParams p;
  p.x = x.data();
  p.x_rows = x.rows;
  p.out = out.data();
  p.num_rows = num_rows;
  p.width = width;
  p.interleaved = one_in(2);
  p.activation = pick({fastattn::Activation::kSilu, fastattn::Activation::kGeluTanh, fastattn::Activation::kGelu});
  p.dtype = TypeInfo<T>::kDType;
  current_call += ": gated_activation of " + std::to_string(num_rows) + " x " + std::to_string(width);
  if (gated_activation(p, nullptr) != cudaSuccess) fail("the call is refused");
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t first = i / 8 * 8;
      const double g = x(row, p.interleaved ? first + i : i);
      const double up = x(row, p.interleaved ? first + i + std::min<int64_t>(8, width - first) : width + i);
      const double act = p.activation == fastattn::Activation::kSilu ? g / (1 + std::exp(-g))
                         : p.activation == fastattn::Activation::kGelu
                             ? 0.5 * g * std::erfc(-g / std::sqrt(2.0))
                             : 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
      expect(static_cast<float>(out[row * width + i]), act * up, kRounding<T>, row, i);
    }
  }
}

// Rows in 8 bits of a norm, of a gated activation or as they are, of ordinary magnitudes and of those whose quotients
// are no products with a reciprocal.
template <typename T>
void call_rounded() {
  enum { kNorm, kGated, kPlain };
  const int kind = between(0, 2);
  const bool in_turns = kind != kNorm && one_in(6);  // on a GPU of one SM, which has two CTAs of such rows
  int64_t row_size = in_turns ? 8 * between(1380, 2048) : draw_row_size();
  const int64_t num_rows = in_turns ? between(4, 7) : row_size > 2048 ? between(1, 4) : draw_num_rows();
  if (num_rows > 100) row_size = std::min<int64_t>(row_size, 320);
  Matrix<T> x(num_rows, kind == kGated ? 2 * row_size : row_size), residual(num_rows, row_size);
  if (kind == kPlain && std::is_same_v<T, __nv_bfloat16>) {
    const float factor = pick({1.0f, 0x1p-70f, 0x1p-115f, 0x1p90f});
    for (T& value : x.memory) value = T(static_cast<float>(value) * factor);
  }
  if (one_in(8)) std::fill(x.memory.begin(), x.memory.end(), T(0.0f));
  const std::vector<T> weight = normals<T>(row_size);
  const bool add = one_in(2), in_int8 = one_in(2);
  current_call += std::string(": 8 bits of ") +
                  (kind == kNorm    ? "a norm"
                   : kind == kGated ? "gates"
                                    : "rows") +
                  ", " + std::to_string(num_rows) + " x " + std::to_string(row_size) + (in_int8 ? ", int8" : ", e4m3");
  std::vector<T> wide(num_rows * row_size, T(NAN));
  std::vector<uint8_t> q(num_rows * row_size, 0x55);
  std::vector<float> scale(num_rows, NAN);
  const fastattn::DType q_dtype = in_int8 ? fastattn::DType::kInt8 : fastattn::DType::kFloat8E4M3;
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) fail("the call is refused");
  };
  if (kind == kNorm) {
    const Matrix<T> before = residual;
    fastattn::RmsNormParams p;
    p.x = x.data();
    p.x_rows = x.rows;
    p.residual = add ? residual.data() : nullptr;
    p.residual_rows = residual.rows;
    p.weight = weight.data();
    p.out = wide.data();
    p.num_rows = num_rows;
    p.row_size = row_size;
    p.eps = 1e-5f;
    p.dtype = TypeInfo<T>::kDType;
    check(rms_norm(p, nullptr));
    const std::vector<T> after = residual.memory;
    residual.memory = before.memory;
    p.residual = add ? residual.data() : nullptr;
    p.out = q.data();
    p.scale = scale.data();
    p.q_dtype = q_dtype;
    check(rms_norm(p, nullptr));
    if (std::memcmp(after.data(), residual.memory.data(), after.size() * sizeof(T)) != 0) fail("another residual");
  } else {
    fastattn::QuantizeRowsParams p;
    p.x = x.data();
    p.x_rows = x.rows;
    p.q = q.data();
    p.scale = scale.data();
    p.num_rows = num_rows;
    p.row_size = row_size;
    p.num_sms = in_turns ? 1 : 132;
    p.dtype = TypeInfo<T>::kDType;
    p.q_dtype = q_dtype;
    p.gated = kind == kGated;
    check(quantize_rows(p, nullptr));
    if (kind == kGated) {
      fastattn::GatedActivationParams g;
      g.x = x.data();
      g.x_rows = x.rows;
      g.out = wide.data();
      g.num_rows = num_rows;
      g.width = row_size;
      g.dtype = TypeInfo<T>::kDType;
      check(gated_activation(g, nullptr));
    } else {
      for (int64_t row = 0; row < num_rows; ++row) {
        for (int64_t i = 0; i < row_size; ++i) wide[row * row_size + i] = x.memory[x.at(row, i)];
      }
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    float largest = 0.0f;
    for (int64_t i = 0; i < row_size; ++i) {
      largest = std::max(largest, std::abs(static_cast<float>(wide[row * row_size + i])));
    }
    const float step = largest / (in_int8 ? 127.0f : 448.0f), by = step == 0.0f ? 1.0f : step;
    if (scale[row] != by) fail("row " + std::to_string(row) + " has another scale");
    for (int64_t i = 0; i < row_size; ++i) {
      const float quotient = static_cast<float>(wide[row * row_size + i]) / by;
      const int8_t code = static_cast<int8_t>(std::clamp(std::nearbyint(quotient), -127.0f, 127.0f));
      const uint8_t expected =
          in_int8 ? static_cast<uint8_t>(code) : __nv_cvt_float_to_fp8(quotient, __NV_SATFINITE, __NV_E4M3);
      if (q[row * row_size + i] != expected) {
        fail("row " + std::to_string(row) + ", column " + std::to_string(i) + ": code " +
             std::to_string(q[row * row_size + i]) + ", expected " + std::to_string(expected));
      }
    }
  }
}

template <typename T>
void call_embedding() {
  const int64_t width = draw_row_size(), num_tokens = between(1, 5), vocab_size = between(1, 6);
  Matrix<T> weight(vocab_size, width);
  weight.rows = Rows(vocab_size, 0, weight.rows.inner_stride);
  std::vector<T> out(num_tokens * width, T(NAN));
  std::vector<int32_t> ids(num_tokens);
  for (int32_t& id : ids) id = between(-3, static_cast<int>(vocab_size));
  std::vector<int32_t> drawn(between(0, 2));
  for (int32_t& id : drawn) id = between(-1, static_cast<int>(vocab_size));
  fastattn::EmbeddingParams p;
  p.drawn = drawn.empty() ? nullptr : drawn.data();
  p.num_drawn = drawn.size();
  p.token_ids = ids.data();
  p.weight = weight.data();
  p.out = out.data();
  p.weight_stride = weight.rows.inner_stride;
  p.num_tokens = num_tokens;
  p.vocab_size = vocab_size;
  p.width = width;
  p.scale = pick({1.0f, 8.0f});
  p.dtype = TypeInfo<T>::kDType;
  current_call += ": embedding of " + std::to_string(num_tokens) + " x " + std::to_string(width);
  if (embedding(p, nullptr) != cudaSuccess) fail("the call is refused");
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t i = 0; i < width; ++i) {
      int64_t id = ids[token];
      if (id < 0 && id >= -p.num_drawn) id = drawn[-1 - id];
      const bool known = id >= 0 && id < vocab_size;
      expect(static_cast<float>(out[token * width + i]), known ? weight(id, i) * p.scale : 0.0, 0.0, token, i);
    }
  }
}

// Masks of all kinds of words for rows that may be none, may be the same, and may begin anywhere.
void call_bitmask() {
  fastattn::ApplyTokenBitmaskParams p;
  p.vocab_size = pick({between(1, 100), between(900, 1200), between(5000, 9000)});
  p.num_rows = between(1, 4);
  p.num_masks = between(1, 5);
  p.logits_stride = p.vocab_size + pick({0, 0, 3});
  p.bitmask_stride = (p.vocab_size + 31) / 32 + pick({0, 2});
  std::vector<float> logits = normals<float>(p.num_rows * p.logits_stride);
  std::vector<int32_t> bitmask(p.num_masks * p.bitmask_stride), rows(p.num_masks);
  for (int32_t& word : bitmask) word = pick({0, -1, 1 << between(0, 31), static_cast<int32_t>(draws())});
  for (int32_t& row : rows) row = between(-1, static_cast<int>(p.num_rows));
  std::vector<float> expected = logits;
  for (int64_t mask = 0; mask < p.num_masks; ++mask) {
    if (rows[mask] < 0 || rows[mask] >= p.num_rows) continue;
    for (int64_t t = 0; t < p.vocab_size; ++t) {
      const uint32_t word = static_cast<uint32_t>(bitmask[mask * p.bitmask_stride + t / 32]);
      if ((word >> t % 32 & 1) == 0) expected[rows[mask] * p.logits_stride + t] = -INFINITY;
    }
  }
  p.logits = logits.data();
  p.bitmask = bitmask.data();
  p.rows = rows.data();
  current_call += ": apply_token_bitmask, " + std::to_string(p.num_masks) + " masks of " + std::to_string(p.vocab_size);
  if (apply_token_bitmask(p, nullptr) != cudaSuccess) fail("the call is refused");
  if (logits != expected) fail("logits are not what is expected");
}

void call_adjust() {
  fastattn::AdjustLogitsParams p;
  p.vocab_size = pick({5, 700});
  p.num_rows = pick({1, 3, 40, one_in(4) ? 2500 : 3});
  p.logits_stride = p.vocab_size + pick({0, 3});
  std::vector<float> logits = normals<float>(p.num_rows * p.logits_stride), expected = logits;
  std::vector<int32_t> ids, counts, indptr = {0};
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int first = between(-1, 2), step = between(1, 3);
    const int num = pick({0, 0, between(0, 4), between(0, static_cast<int>(p.vocab_size) / 3)});
    for (int i = 0; i < num; ++i) {
      ids.push_back(first + i * step);
      counts.push_back(between(-1, 2));
    }
    indptr.push_back(static_cast<int32_t>(ids.size()));
  }
  p.nnz = static_cast<int64_t>(ids.size());
  ids.resize(p.nnz + 1);
  counts.resize(p.nnz + 1);
  if (one_in(4)) p.nnz /= 2;
  const std::vector<float> bias = normals<float>(ids.size());
  std::vector<float> penalties[3];
  for (auto& values : penalties) {
    for (int64_t row = 0; row < p.num_rows; ++row) values.push_back(0.5f + 0.125f * static_cast<float>(between(0, 8)));
  }
  p.logits = logits.data();
  p.token_ids = ids.data();
  p.counts = counts.data();
  p.bias = bias.data();
  p.indptr = indptr.data();
  p.repetition_penalty = penalties[0].data();
  p.presence_penalty = penalties[1].data();
  p.frequency_penalty = penalties[2].data();
  current_call += ": adjust_logits, " + std::to_string(p.nnz) + " entries of " + std::to_string(p.num_rows) + " rows";
  for (int64_t row = 0; row < p.num_rows; ++row) {
    for (int64_t i = indptr[row]; i < std::min<int64_t>(indptr[row + 1], p.nnz); ++i) {
      if (ids[i] < 0 || ids[i] >= p.vocab_size) continue;
      float& logit = expected[row * p.logits_stride + ids[i]];
      if (counts[i] >= 0) {
        logit = logit > 0 ? logit / penalties[0][row] : logit * penalties[0][row];
        logit -= (counts[i] > 0 ? penalties[1][row] : 0) + penalties[2][row] * static_cast<float>(counts[i]);
      }
      logit += bias[i];
    }
  }
  if (adjust_logits(p, nullptr) != cudaSuccess) fail("the call is refused");
  for (int64_t row = 0; row < p.num_rows; ++row) {
    for (int64_t i = 0; i < p.logits_stride; ++i) {
      expect(logits[row * p.logits_stride + i], expected[row * p.logits_stride + i], 1e-6, row, i);
    }
  }
}

template <typename T>
void call_halves(int op) {
  if (op <= 2) call_norm<T>(op == 2);
  if (op == 3) call_gated<T>();
  if (op == 4) call_embedding<T>();
  if (op == 7) call_rounded<T>();
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int, int size) {
    const int op = size > 0 ? size : between(1, 7);
    if (op == 5) return call_bitmask();
    if (op == 6) return call_adjust();
    return one_in(2) ? call_halves<__nv_bfloat16>(op) : call_halves<__half>(op);
  });
}
