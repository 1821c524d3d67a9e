#include "elementwise/quantize_rows.h"
#include "torch/gated_activation_call.h"
#include "torch/gemm_call.h"
#include "torch/gemm_workspaces.h"

namespace fastattn {
namespace {

// activation: of gates, or "" where x is quantized as it is. zero_point: where those of the rows go, if there are any.
std::tuple<Tensor, Tensor> quantize_rows_op(const char* op, const Tensor& x, const std::string& activation,
                                            ScalarType q_dtype, bool groups = false,
                                            std::optional<Tensor>* zero_point = nullptr) {
  const Checks checks(op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, kHalves);
  QuantizeRowsParams p;
  p.gated = !activation.empty();
  if (p.gated) {
    checks.that(x.size(1) % 2 == 0,
                "x has a last dimension of " + std::to_string(x.size(1)) + ", expected it even with an activation");
    p.activation = activation_named(checks, activation);
  }
  p.row_size = x.size(1) / (p.gated ? 2 : 1);
  Tensor q = empty(x, {x.size(0), p.row_size}, q_dtype);
  std::vector<int64_t> scale_shape = {x.size(0)};
  if (groups) scale_shape.insert(scale_shape.begin(), ceil_div(p.row_size, kQuantizeGroup));
  Tensor scale = empty(x, scale_shape, ScalarType::Float);
  if (zero_point != nullptr) *zero_point = empty(x, {x.size(0)}, ScalarType::Int);
  if (scale.numel() == 0) return {q, scale};

  const OnDeviceOf guard(x);
  p.x = x.data_ptr();
  p.q = q.data_ptr();
  p.scale = static_cast<float*>(scale.data_ptr());
  p.x_rows = rows_of(x);
  p.num_rows = x.size(0);
  p.num_sms = num_sms_of(x);
  p.dtype = dtype_of(x);
  p.q_dtype = dtype_of(q);
  if (zero_point != nullptr) p.zero_point = static_cast<int32_t*>((*zero_point)->data_ptr());
  const auto launch = zero_point != nullptr ? quantize_rows_asymmetric : groups ? quantize_groups : quantize_rows;
  check_launch(op, launch(p, stream_of(x)));
  return {q, scale};
}

std::tuple<Tensor, Tensor> quantize_int8_op(const Tensor& x, const std::string& activation) {
  return quantize_rows_op("quantize_int8", x, activation, ScalarType::Char);
}

std::tuple<Tensor, Tensor, Tensor> quantize_int8_asymmetric_op(const Tensor& x, const std::string& activation) {
  std::optional<Tensor> zero_point;
  const auto [q, scale] =
      quantize_rows_op("quantize_int8_asymmetric", x, activation, ScalarType::Char, false, &zero_point);
  return {q, scale, *zero_point};
}

std::tuple<Tensor, Tensor> quantize_fp8_op(const Tensor& x, const std::string& activation) {
  return quantize_rows_op("quantize_fp8", x, activation, ScalarType::Float8_e4m3fn);
}

std::tuple<Tensor, Tensor> quantize_fp8_groups_op(const Tensor& x, const std::string& activation) {
  return quantize_rows_op("quantize_fp8_groups", x, activation, ScalarType::Float8_e4m3fn, true);
}

// A product of operands of 8 bits, and the kernels that have it.
struct EightBitLinear {
  const char* op;
  ScalarType dtype, sum_dtype;
  cudaError_t (*sm90)(const GemmSm90Params&, cudaStream_t);
  cudaError_t (*gated_sm90)(const GemmSm90Params&, cudaStream_t);
  cudaError_t (*sm80)(const GemmSm80Params&, cudaStream_t);
};

// Of x less its zero points, x_zero_point (M) or (1) as x_scale, with weight_sum (N) of each row of weight.
struct ZeroPoints {
  MaybeTensor x_zero_point, weight_sum;
};

Tensor eight_bit_linear(const EightBitLinear& kind, const Tensor& x, const Tensor& x_scale, const Tensor& weight,
                        const Tensor& weight_scale, const MaybeTensor& bias, ScalarType out_dtype, bool fast_accum,
                        const ZeroPoints& zero = {}, bool batch_invariant = false,
                        const std::string& activation_name = "") {
  const Checks checks(kind.op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, {kind.dtype});
  const int64_t m = x.size(0), k = x.size(1);
  const auto check_scale = [&](const char* name, const Tensor& scale, int64_t rows) {
    const bool is_shared = scale.dim() == 1 && scale.size(0) == 1;
    checks.shape(name, scale, {is_shared ? 1 : rows}).dtype(name, scale, {ScalarType::Float});
    return is_shared ? int64_t{0} : int64_t{1};
  };
  const int64_t x_scale_stride = check_scale("x_scale", x_scale, m);
  checks.shape("weight", weight, {kAny, k}).dtype("weight", weight, {kind.dtype});
  const int64_t n = weight.size(0);
  const int64_t weight_scale_stride = check_scale("weight_scale", weight_scale, n);
  checks.that(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half,
              "out_dtype is another dtype, expected bfloat16 or float16");
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {out_dtype});
  checks.that(zero.x_zero_point.has_value() == zero.weight_sum.has_value(),
              "x_zero_point and weight_sum are expected together, or neither");
  checks.that(!(batch_invariant && fast_accum), "fast_accum is true, expected false with batch_invariant");
  if (zero.x_zero_point) {
    checks.shape("x_zero_point", *zero.x_zero_point, {x_scale.size(0)})
        .dtype("x_zero_point", *zero.x_zero_point, {ScalarType::Int});
    checks.shape("weight_sum", *zero.weight_sum, {n}).dtype("weight_sum", *zero.weight_sum, {ScalarType::Int});
  }
  if (kind.sum_dtype == ScalarType::Int) {
    const int log2_limit = zero.x_zero_point ? 16 : 17;
    checks.that(k < (1 << log2_limit), "x has K = " + std::to_string(k) + ", expected K < 2^" +
                                           std::to_string(log2_limit) + ": longer sums leave int32");
  }
  std::optional<Activation> activation;
  if (!activation_name.empty()) {
    activation = activation_named(checks, activation_name);
    checks.that(n % 2 == 0, "weight has " + std::to_string(n) + " rows, expected as many of gates as of ups");
  }
  Tensor out = empty(x, {m, activation ? n / 2 : n}, out_dtype);
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x);
  const Matrix rows = matrix_of(x), columns = matrix_of(weight);
  // GeLU with erf is for the activation's own kernel, and so are gates of sums in fp32 that are to be in order.
  const bool has_gates =
      activation != Activation::kGelu && n % 16 == 0 && !(batch_invariant && kind.sum_dtype == ScalarType::Float);
  const bool fits = fits_gemm_sm90(rows, columns, {bias, weight_scale, zero.weight_sum}, out);
  if (activation && !(has_gates && fits)) {
    const Tensor product =
        eight_bit_linear(kind, x, x_scale, weight, weight_scale, bias, out_dtype, fast_accum, zero, batch_invariant);
    run_gated_activation(kind.op, product, *activation, true, out);
    return out;
  }
  const auto params = [&](auto p) {
    p = gemm_params_of<decltype(p)>(rows, columns, bias, out);
    p.x_scale = data<float>(x_scale);
    p.weight_scale = data<float>(weight_scale);
    p.x_scale_stride = x_scale_stride;
    p.weight_scale_stride = weight_scale_stride;
    if (zero.x_zero_point) {
      p.x_zero_point = data<int32_t>(*zero.x_zero_point);
      p.weight_code_sum = data<int32_t>(*zero.weight_sum);
    }
    return p;
  };
  if (fits) {
    auto p = params(GemmSm90Params());
    p.fast_accum = fast_accum;
    if (activation) *activation == Activation::kSilu ? set_silu_gate(p) : set_gelu_tanh_gate(p);
    const bool two_levels = kind.dtype == ScalarType::Float8_e4m3fn && !fast_accum;
    p.config = gemm_sm90_config({.m = m,
                                 .n = n,
                                 .k = k,
                                 .num_sms = num_sms_of(x),
                                 .element_bytes = 1,
                                 .two_levels = two_levels,
                                 .gated = activation.has_value(),
                                 .zero_points = zero.x_zero_point.has_value(),
                                 .in_order = batch_invariant,
                                 .fast_accum = fast_accum});
    const auto workspaces = workspaces_of(p, x);
    check_launch(kind.op, (activation ? kind.gated_sm90 : kind.sm90)(p, stream_of(x)));
    return out;
  }
  auto p = params(GemmSm80Params());
  run_gemm_sm80(kind.op, p, rows.aligned() && columns.aligned(), ceil_div(k, 2), kind.sum_dtype, x, kind.sm80,
                batch_invariant);
  return out;
}

Tensor int8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& x_zero_point,
                      const std::optional<Tensor>& weight_sum, ScalarType out_dtype, const std::string& activation) {
  const EightBitLinear kind = {"int8_linear",  ScalarType::Char,     ScalarType::Int,
                               gemm_int8_sm90, gemm_gated_int8_sm90, gemm_int8_sm80};
  return eight_bit_linear(kind, x, x_scale, weight, weight_scale, bias, out_dtype, false, {x_zero_point, weight_sum},
                          false, activation);
}

Tensor fp8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
                     const std::optional<Tensor>& bias, ScalarType out_dtype, bool fast_accum, bool batch_invariant,
                     const std::string& activation) {
  const EightBitLinear kind = {"fp8_linear",  ScalarType::Float8_e4m3fn, ScalarType::Float,
                               gemm_fp8_sm90, gemm_gated_fp8_sm90,       gemm_fp8_sm80};
  return eight_bit_linear(kind, x, x_scale, weight, weight_scale, bias, out_dtype, fast_accum, {}, batch_invariant,
                          activation);
}

Tensor fp8_block_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
                           const std::optional<Tensor>& bias, ScalarType out_dtype) {
  constexpr int64_t kBlock = kQuantizeGroup;
  const char* const op = "fp8_block_linear";
  const Checks checks(op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, {ScalarType::Float8_e4m3fn});
  const int64_t m = x.size(0), k = x.size(1), num_panels = ceil_div(k, kBlock);
  checks.shape("x_scale", x_scale, {num_panels, m}).dtype("x_scale", x_scale, {ScalarType::Float});
  checks.shape("weight", weight, {kAny, k}).dtype("weight", weight, {ScalarType::Float8_e4m3fn});
  const int64_t n = weight.size(0);
  checks.shape("weight_scale", weight_scale, {ceil_div(n, kBlock), num_panels})
      .dtype("weight_scale", weight_scale, {ScalarType::Float});
  checks.that(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half,
              "out_dtype is another dtype, expected bfloat16 or float16");
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {out_dtype});
  Tensor out = empty(x, {m, n}, out_dtype);
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x);
  const Matrix rows = matrix_of(x), columns = matrix_of(weight);
  const auto params = [&](auto p) {
    p = gemm_params_of<decltype(p)>(rows, columns, bias, out);
    p.x_scale = data<float>(x_scale);
    p.weight_scale = data<float>(weight_scale);
    p.x_scale_stride = x_scale.stride(0);
    p.weight_scale_stride = weight_scale.stride(0);
    return p;
  };
  if (fits_gemm_sm90(rows, columns, {bias}, out)) {
    auto p = params(GemmSm90Params());
    p.config = gemm_sm90_config({.m = m,
                                 .n = n,
                                 .k = k,
                                 .num_sms = num_sms_of(x),
                                 .element_bytes = 1,
                                 .two_levels = true,
                                 .block_scales = true});
    const auto workspaces = workspaces_of(p, x);
    check_launch(op, gemm_fp8_blocks_sm90(p, stream_of(x)));
    return out;
  }
  check_launch(op, gemm_fp8_blocks_plain(params(GemmSm80Params()), stream_of(x)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("quantize_int8", TORCH_BOX(&quantize_int8_op));
  m.impl("quantize_int8_asymmetric", TORCH_BOX(&quantize_int8_asymmetric_op));
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8_op));
  m.impl("quantize_fp8_groups", TORCH_BOX(&quantize_fp8_groups_op));
  m.impl("fp8_block_linear", TORCH_BOX(&fp8_block_linear_op));
  m.impl("int8_linear", TORCH_BOX(&int8_linear_op));
  m.impl("fp8_linear", TORCH_BOX(&fp8_linear_op));
}

}  // namespace fastattn
