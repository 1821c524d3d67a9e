#include "norm/layer_norm.h"
#include "norm/rms_norm.h"
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

Tensor dense_layer(const DenseLayer& kind, const Tensor& x_given, const Tensor& weight, const MaybeTensor& weight_sum,
                   const MaybeTensor& bias, double eps, std::optional<Activation> activation = std::nullopt) {
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
    p.config = gemm_sm90_config({p.m, n, k, num_sms_of(x), 2, false, kind.norm, activation.has_value()});
    const auto workspaces = workspaces_of(p, x);
    check_launch(kind.op, (activation ? kind.gated_sm90 : kind.sm90)(p, stream_of(x)));
    return out;
  }
  if (activation) {
    const Tensor product = dense_layer(kind, x, weight, weight_sum, bias, eps);
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
  run_gemm_sm80(kind.op, p, rows.aligned() && columns.aligned(), k, ScalarType::Float, x, gemm_sm80);
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

Tensor linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return dense_layer({"linear", gemm_sm90}, x, weight, std::nullopt, bias, 0.0);
}

Tensor rms_norm_linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  const DenseLayer kind = {"rms_norm_linear", gemm_rms_norm_sm90, GemmSm90Norm::kRms,
                           normalize<RmsNormParams, rms_norm>};
  return dense_layer(kind, x, weight, std::nullopt, bias, eps);
}

Tensor gated_linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::string& activation) {
  const DenseLayer kind = {"gated_linear", gemm_sm90, GemmSm90Norm::kNone, nullptr, gemm_gated_sm90};
  const Checks checks(kind.op, "x", x);
  return dense_layer(kind, x, weight, std::nullopt, bias, 0.0, activation_named(checks, activation));
}

Tensor rms_norm_gated_linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                const std::string& activation, double eps) {
  const DenseLayer kind = {"rms_norm_gated_linear", gemm_rms_norm_sm90, GemmSm90Norm::kRms,
                           normalize<RmsNormParams, rms_norm>, gemm_rms_norm_gated_sm90};
  const Checks checks(kind.op, "x", x);
  return dense_layer(kind, x, weight, std::nullopt, bias, eps, activation_named(checks, activation));
}

Tensor layer_norm_linear_op(const Tensor& x, const Tensor& weight, const Tensor& weight_sum,
                            const std::optional<Tensor>& bias, double eps) {
  const DenseLayer kind = {"layer_norm_linear", gemm_layer_norm_sm90, GemmSm90Norm::kLayer,
                           normalize<LayerNormParams, layer_norm>};
  return dense_layer(kind, x, weight, weight_sum, bias, eps);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("rms_norm_linear", TORCH_BOX(&rms_norm_linear_op));
  m.impl("gated_linear", TORCH_BOX(&gated_linear_op));
  m.impl("rms_norm_gated_linear", TORCH_BOX(&rms_norm_gated_linear_op));
  m.impl("layer_norm_linear", TORCH_BOX(&layer_norm_linear_op));
}

}  // namespace fastattn
