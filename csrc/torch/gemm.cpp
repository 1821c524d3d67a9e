#include "elementwise/add_rows.h"
#include "norm/layer_norm.h"
#include "norm/rms_norm.h"
#include "sampling/gumbel_max.h"
#include "torch/gated_activation_call.h"
#include "torch/gemm_call.h"
#include "torch/gemm_workspaces.h"

namespace fastattn {
namespace {

// A dense layer, and what is done to x's rows before: which Hopper kernel has both, and which one the norm alone; and
// which one has a gated activation behind it too.
struct DenseLayer {
  const char* op;
  cudaError_t (*sm90)(const GemmSm90Params&, cudaStream_t);
  GemmSm90Norm norm = GemmSm90Norm::kNone;
  void (*normalize)(const char* op, const Tensor& x, double eps, Tensor& out) = nullptr;
  cudaError_t (*gated_sm90)(const GemmSm90Params&, cudaStream_t) = nullptr;
};

// Of sums of the squares of 32 columns each: of rows (..., N) it is (..., N / 32 rounded up).
std::vector<int64_t> shape_of_sums(std::vector<int64_t> rows) {
  rows.back() = gemm_sm90_squares_parts(rows.back());
  return rows;
}

Tensor dense_layer(const DenseLayer& kind, const Tensor& x_given, const Tensor& weight, const MaybeTensor& weight_sum,
                   const MaybeTensor& bias, double eps, std::optional<Activation> activation = std::nullopt,
                   bool batch_invariant = false, const MaybeTensor& sums_of_squares = std::nullopt) {
  const Checks checks(kind.op, "x", x_given);
  checks.rows("x", x_given).dtype("x", x_given, kHalves);
  std::vector<int64_t> shape = shape_of(x_given);
  const int64_t k = shape.back();
  checks.shape("weight", weight, {kAny, k}).dtype("weight", weight, {x_given.scalar_type()});
  const int64_t n = weight.size(0);
  if (weight_sum) checks.shape("weight_sum", *weight_sum, {n}).dtype("weight_sum", *weight_sum, {ScalarType::Float});
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {x_given.scalar_type()});
  if (activation) {
    checks.that(n % 2 == 0, "weight has " + std::to_string(n) + " rows, expected as many of gates as of ups");
  }
  if (sums_of_squares) {
    checks.rows("sums_of_squares", *sums_of_squares).dtype("sums_of_squares", *sums_of_squares, {ScalarType::Float});
    checks.that(
        shape_of(*sums_of_squares) == shape_of_sums(shape),
        "sums_of_squares has not the shape (..., " + std::to_string(gemm_sm90_squares_parts(k)) + ") of x's rows");
  }
  shape.back() = activation ? n / 2 : n;
  Tensor out = empty(x_given, shape, x_given.scalar_type());
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x_given);
  // Rows in two runs (a slice of the middle dimension) are packed first: the kernels know one stride.
  Tensor x = rows_of(x_given).inner() < num_rows_of(x_given) ? packed_copy(x_given) : x_given;
  const auto matrix_of_x = [&] { return Matrix{x.data_ptr(), num_rows_of(x), k, rows_of(x).inner_stride, 2}; };
  const Matrix columns = matrix_of(weight);
  // GeLU with erf is for the activation's own kernel.
  const bool has_kernel = !activation || (*activation != Activation::kGelu && n % 16 == 0);
  if (has_kernel && fits_gemm_sm90(matrix_of_x(), columns, {weight_sum, bias}, out)) {
    auto p = gemm_params_of<GemmSm90Params>(matrix_of_x(), columns, bias, out);
    p.eps = static_cast<float>(eps);
    if (weight_sum) p.weight_sum = data<float>(*weight_sum);
    if (activation) *activation == Activation::kSilu ? set_silu_gate(p) : set_gelu_tanh_gate(p);
    std::optional<Tensor> sums;
    if (sums_of_squares) {
      sums = sums_of_squares->is_contiguous() ? *sums_of_squares : packed_copy(*sums_of_squares);
      p.x_squares = data<float>(*sums);
    }
    p.config = gemm_sm90_config({.m = p.m,
                                 .n = n,
                                 .k = k,
                                 .num_sms = num_sms_of(x),
                                 .norm = sums ? GemmSm90Norm::kRmsGiven : kind.norm,
                                 .gated = activation.has_value(),
                                 .in_order = batch_invariant});
    const auto workspaces = workspaces_of(p, x);
    std::optional<Tensor> row_norms;
    if (p.config.num_row_norms > 0) {
      row_norms = empty(x, {2 * p.config.num_row_norms}, ScalarType::Float);
      p.row_norms = static_cast<float2*>(row_norms->data_ptr());
    }
    check_launch(kind.op, (activation ? kind.gated_sm90 : kind.sm90)(p, stream_of(x)));
    return out;
  }
  if (activation) {
    const Tensor product =
        dense_layer(kind, x, weight, weight_sum, bias, eps, std::nullopt, batch_invariant, sums_of_squares);
    run_gated_activation(kind.op, product, *activation, true, out);
    return out;
  }
  if (kind.normalize != nullptr && k > 0) {
    Tensor normalized = empty(x, shape_of(x), x.scalar_type());
    kind.normalize(kind.op, x, eps, normalized);
    x = normalized;
  }
  const Matrix rows = matrix_of_x();
  auto p = gemm_params_of<GemmSm80Params>(rows, columns, bias, out);
  run_gemm_sm80(kind.op, p, rows.aligned() && columns.aligned(), k, ScalarType::Float, x, gemm_sm80, batch_invariant);
  return out;
}

// x's rows, normalized, without weight and bias: these are in the layer's.
template <typename Params, cudaError_t (*launch)(const Params&, cudaStream_t)>
void normalize(const char* op, const Tensor& x, double eps, Tensor& out) {
  Params p;
  p.x = x.data_ptr();
  p.out = out.data_ptr();
  p.x_rows = rows_of(x);
  p.num_rows = num_rows_of(x);
  p.row_size = x.size(x.dim() - 1);
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x);
  check_launch(op, launch(p, stream_of(x)));
}

Tensor linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool batch_invariant) {
  return dense_layer({"linear", gemm_sm90}, x, weight, std::nullopt, bias, 0.0, std::nullopt, batch_invariant);
}

// Hopper's kernels add the residual before they round; elsewhere it is added to what `linear` gives. sums: of the
// result's squares, where they are wanted.
Tensor linear_added(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& residual,
                    Tensor* sums = nullptr) {
  const DenseLayer kind = {"linear", gemm_sm90};
  const Checks checks(kind.op, "x", x);
  checks.rows("x", x).dtype("x", x, kHalves).rows("residual", residual).dtype("residual", residual, {x.scalar_type()});
  std::vector<int64_t> shape = shape_of(x);
  const int64_t k = shape.back();
  checks.shape("weight", weight, {kAny, k}).dtype("weight", weight, {x.scalar_type()});
  const int64_t n = weight.size(0);
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {x.scalar_type()});
  shape.back() = n;
  checks.that(shape_of(residual) == shape, "residual has not the shape of the result");

  const int64_t m = num_rows_of(x);
  const Rows of_x = rows_of(x), of_residual = rows_of(residual);
  const OnDeviceOf guard(x);
  if (sums != nullptr) *sums = empty(x, shape_of_sums(shape), ScalarType::Float);
  float* const squares = sums != nullptr ? static_cast<float*>(sums->data_ptr()) : nullptr;
  if (m * n > 0 && of_x.inner() == m && of_residual.inner() == m) {
    const Matrix rows = {x.data_ptr(), m, k, of_x.inner_stride, 2}, columns = matrix_of(weight);
    Tensor out = empty(x, shape, x.scalar_type());
    if (fits_gemm_sm90(rows, columns, {bias}, out)) {
      auto p = gemm_params_of<GemmSm90AddedParams>(rows, columns, bias, out);
      p.config = gemm_sm90_config({.m = m, .n = n, .k = k, .num_sms = num_sms_of(x), .added = true});
      const int64_t unit = p.config.few_rows ? 4 : 8;  // elements that a thread asks for
      if (of_residual.inner_stride % unit == 0 && reinterpret_cast<uintptr_t>(residual.data_ptr()) % (2 * unit) == 0) {
        p.residual = residual.data_ptr();
        p.residual_stride = of_residual.inner_stride;
        p.squares = squares;
        const auto workspaces = workspaces_of(p, x);
        check_launch(kind.op, gemm_added_sm90(p, stream_of(x)));
        return out;
      }
    }
  }
  Tensor out = dense_layer(kind, x, weight, std::nullopt, bias, 0.0);
  if (out.numel() == 0) return out;
  AddRowsParams p;
  p.out = out.data_ptr();
  p.rows = residual.data_ptr();
  p.of_rows = of_residual;
  p.squares = squares;
  p.num_rows = m;
  p.row_size = n;
  p.dtype = dtype_of(out);
  check_launch(kind.op, add_rows(p, stream_of(x)));
  return out;
}

Tensor linear_add_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& residual) {
  return linear_added(x, weight, bias, residual);
}

std::tuple<Tensor, Tensor> linear_add_sums_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const Tensor& residual) {
  Tensor sums;
  Tensor out = linear_added(x, weight, bias, residual, &sums);
  return {out, sums};
}

Tensor rms_norm_linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                          const std::optional<Tensor>& sums_of_squares) {
  const DenseLayer kind = {"rms_norm_linear", gemm_rms_norm_sm90, GemmSm90Norm::kRms,
                           normalize<RmsNormParams, rms_norm>};
  return dense_layer(kind, x, weight, std::nullopt, bias, eps, std::nullopt, false, sums_of_squares);
}

Tensor gated_linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::string& activation, bool batch_invariant) {
  const DenseLayer kind = {"gated_linear", gemm_sm90, GemmSm90Norm::kNone, nullptr, gemm_gated_sm90};
  const Checks checks(kind.op, "x", x);
  return dense_layer(kind, x, weight, std::nullopt, bias, 0.0, activation_named(checks, activation), batch_invariant);
}

Tensor rms_norm_gated_linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const std::string& activation, double eps,
                                const std::optional<Tensor>& sums_of_squares) {
  const DenseLayer kind = {"rms_norm_gated_linear", gemm_rms_norm_sm90, GemmSm90Norm::kRms,
                           normalize<RmsNormParams, rms_norm>, gemm_rms_norm_gated_sm90};
  const Checks checks(kind.op, "x", x);
  return dense_layer(kind, x, weight, std::nullopt, bias, eps, activation_named(checks, activation), false,
                     sums_of_squares);
}

Tensor layer_norm_linear_op(const Tensor& x, const Tensor& weight, const Tensor& weight_sum,
                            const std::optional<Tensor>& bias, double eps) {
  const DenseLayer kind = {"layer_norm_linear", gemm_layer_norm_sm90, GemmSm90Norm::kLayer,
                           normalize<LayerNormParams, layer_norm>};
  return dense_layer(kind, x, weight, weight_sum, bias, eps);
}

// A head and the draw behind it. Up to 32 rows the kernel that `linear` takes for few rows draws too, and writes the
// best of each tile; elsewhere, and where `linear` has tiles for so few (17 to 32 rows of a vocabulary below 6,000),
// `linear` writes logits, which are multiplied in the same order and rounded alike.
std::tuple<Tensor, Tensor> lm_head_sample_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                             const Tensor& temperature, const Tensor& seed, const Tensor& position,
                                             int64_t first_id) {
  const DenseLayer kind = {"lm_head_sample", gemm_sm90};
  const Checks checks(kind.op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, kHalves);
  const int64_t m = x.size(0), k = x.size(1);
  checks.shape("weight", weight, {kAny, k}).dtype("weight", weight, {x.scalar_type()});
  const int64_t n = weight.size(0);
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {x.scalar_type()});
  checks.shape("temperature", temperature, {m}).dtype("temperature", temperature, {ScalarType::Float});
  checks.shape("seed", seed, {m}).dtype("seed", seed, {ScalarType::Long});
  checks.shape("position", position, {m}).dtype("position", position, {ScalarType::Long});
  checks.that(n > 0, "weight has no rows, expected one for each token");
  checks.that(first_id >= 0 && first_id % 4 == 0 && first_id <= INT32_MAX - n,
              "first_id is " + std::to_string(first_id) + ", expected a multiple of 4, 0 to 2^31 - 1 - V");
  Tensor token_ids = empty(x, {m}, ScalarType::Int), scores = empty(x, {m}, ScalarType::Float);
  if (m == 0) return {token_ids, scores};

  const OnDeviceOf guard(x);
  GumbelMaxParams drawn;
  drawn.temperature = data<float>(temperature);
  drawn.seed = data<int64_t>(seed);
  drawn.position = data<int64_t>(position);
  drawn.token_ids = static_cast<int32_t*>(token_ids.data_ptr());
  drawn.scores = static_cast<float*>(scores.data_ptr());
  drawn.num_rows = m;
  drawn.vocab_size = static_cast<int32_t>(n);
  drawn.first_id = static_cast<int32_t>(first_id);
  drawn.dtype = dtype_of(x);
  const auto make_choices = [&](int64_t num_parts) {
    Tensor choices = empty(x, {m, num_parts}, ScalarType::Long);
    drawn.choices = static_cast<uint64_t*>(choices.data_ptr());
    drawn.num_parts = num_parts;
    return choices;
  };

  const Matrix rows = matrix_of(x), columns = matrix_of(weight);
  GemmSm90Config config = {};
  if (m <= kGemmSm90MostSampledRows && fits_gemm_sm90(rows, columns, {bias}, token_ids)) {
    config = gemm_sm90_config({m, n, k, num_sms_of(x)});
  }
  if (config.few_rows) {
    const Tensor choices = make_choices(config.n_tiles);
    auto p = gemm_params_of<GemmSm90SampledParams>(rows, columns, bias, token_ids);
    p.dtype = drawn.dtype;
    p.config = config;
    p.temperature = drawn.temperature;
    p.seed = drawn.seed;
    p.position = drawn.position;
    p.choices = drawn.choices;
    p.first_id = drawn.first_id;
    check_launch(kind.op, gemm_sampled_sm90(p, stream_of(x)));
    check_launch(kind.op, best_choices(drawn, stream_of(x)));
  } else {
    const Tensor logits = dense_layer(kind, x, weight, std::nullopt, bias, 0.0);
    const Tensor choices = make_choices((n + kGumbelPartSize - 1) / kGumbelPartSize);
    drawn.logits = logits.data_ptr();
    check_launch(kind.op, gumbel_choices(drawn, stream_of(x)));
    check_launch(kind.op, best_choices(drawn, stream_of(x)));
  }
  return {token_ids, scores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("linear_add", TORCH_BOX(&linear_add_op));
  m.impl("linear_add_sums", TORCH_BOX(&linear_add_sums_op));
  m.impl("rms_norm_linear", TORCH_BOX(&rms_norm_linear_op));
  m.impl("gated_linear", TORCH_BOX(&gated_linear_op));
  m.impl("rms_norm_gated_linear", TORCH_BOX(&rms_norm_gated_linear_op));
  m.impl("layer_norm_linear", TORCH_BOX(&layer_norm_linear_op));
  m.impl("lm_head_sample", TORCH_BOX(&lm_head_sample_op));
}

}  // namespace fastattn
