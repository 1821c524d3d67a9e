#include "elementwise/quantize_rows.h"
#include "torch/gemm_call.h"
#include "torch/gemm_workspaces.h"

namespace fastattn {
namespace {

std::tuple<Tensor, Tensor> quantize_rows_op(const char* op, const Tensor& x, ScalarType q_dtype, bool groups = false) {
  const Checks checks(op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, kHalves);
  Tensor q = empty(x, shape_of(x), q_dtype);
  std::vector<int64_t> scale_shape = {x.size(0)};
  if (groups) scale_shape.insert(scale_shape.begin(), ceil_div(x.size(1), kQuantizeGroup));
  Tensor scale = empty(x, scale_shape, ScalarType::Float);
  if (scale.numel() == 0) return {q, scale};

  const OnDeviceOf guard(x);
  QuantizeRowsParams p;
  p.x = x.data_ptr();
  p.q = q.data_ptr();
  p.scale = static_cast<float*>(scale.data_ptr());
  p.x_rows = rows_of(x);
  p.num_rows = x.size(0);
  p.row_size = x.size(1);
  p.dtype = dtype_of(x);
  p.q_dtype = dtype_of(q);
  check_launch(op, (groups ? quantize_groups : quantize_rows)(p, stream_of(x)));
  return {q, scale};
}

std::tuple<Tensor, Tensor> quantize_int8_op(const Tensor& x) {
  return quantize_rows_op("quantize_int8", x, ScalarType::Char);
}

std::tuple<Tensor, Tensor> quantize_fp8_op(const Tensor& x) {
  return quantize_rows_op("quantize_fp8", x, ScalarType::Float8_e4m3fn);
}

std::tuple<Tensor, Tensor> quantize_fp8_groups_op(const Tensor& x) {
  return quantize_rows_op("quantize_fp8_groups", x, ScalarType::Float8_e4m3fn, true);
}

// A product of operands of 8 bits, and the kernels that have it.
struct EightBitLinear {
  const char* op;
  ScalarType dtype, sum_dtype;
  bool may_share_scale;  // a scale may be that of all rows
  cudaError_t (*sm90)(const GemmSm90Params&, cudaStream_t);
  cudaError_t (*sm80)(const GemmSm80Params&, cudaStream_t);
};

Tensor eight_bit_linear(const EightBitLinear& kind, const Tensor& x, const Tensor& x_scale, const Tensor& weight,
                        const Tensor& weight_scale, const MaybeTensor& bias, ScalarType out_dtype, bool fast_accum) {
  const Checks checks(kind.op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, {kind.dtype});
  const int64_t m = x.size(0), k = x.size(1);
  const auto check_scale = [&](const char* name, const Tensor& scale, int64_t rows) {
    const bool is_shared = kind.may_share_scale && scale.dim() == 1 && scale.size(0) == 1;
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
  if (kind.sum_dtype == ScalarType::Int) {
    checks.that(k < (1 << 17), "x has K = " + std::to_string(k) + ", expected K < 2^17: longer sums leave int32");
  }
  Tensor out = empty(x, {m, n}, out_dtype);
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x);
  const Matrix rows = matrix_of(x), columns = matrix_of(weight);
  const auto params = [&](auto p) {
    p = gemm_params_of<decltype(p)>(rows, columns, bias, out);
    p.x_scale = data<float>(x_scale);
    p.weight_scale = data<float>(weight_scale);
    p.x_scale_stride = x_scale_stride;
    p.weight_scale_stride = weight_scale_stride;
    return p;
  };
  if (fits_gemm_sm90(rows, columns, {bias, weight_scale}, out)) {
    auto p = params(GemmSm90Params());
    p.fast_accum = fast_accum;
    const bool two_levels = kind.dtype == ScalarType::Float8_e4m3fn && !fast_accum;
    p.config = gemm_sm90_config({m, n, k, num_sms_of(x), 1, two_levels});
    const auto workspaces = workspaces_of(p, x);
    check_launch(kind.op, kind.sm90(p, stream_of(x)));
    return out;
  }
  auto p = params(GemmSm80Params());
  run_gemm_sm80(kind.op, p, rows.aligned() && columns.aligned(), ceil_div(k, 2), kind.sum_dtype, x, kind.sm80);
  return out;
}

Tensor int8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
                      const std::optional<Tensor>& bias, ScalarType out_dtype) {
  const EightBitLinear kind = {"int8_linear", ScalarType::Char, ScalarType::Int, false, gemm_int8_sm90, gemm_int8_sm80};
  return eight_bit_linear(kind, x, x_scale, weight, weight_scale, bias, out_dtype, false);
}

Tensor fp8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& weight_scale,
                     const std::optional<Tensor>& bias, ScalarType out_dtype, bool fast_accum) {
  const EightBitLinear kind = {"fp8_linear", ScalarType::Float8_e4m3fn, ScalarType::Float, true, gemm_fp8_sm90,
                               gemm_fp8_sm80};
  return eight_bit_linear(kind, x, x_scale, weight, weight_scale, bias, out_dtype, fast_accum);
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
  m.impl("quantize_fp8", TORCH_BOX(&quantize_fp8_op));
  m.impl("quantize_fp8_groups", TORCH_BOX(&quantize_fp8_groups_op));
  m.impl("fp8_block_linear", TORCH_BOX(&fp8_block_linear_op));
  m.impl("int8_linear", TORCH_BOX(&int8_linear_op));
  m.impl("fp8_linear", TORCH_BOX(&fp8_linear_op));
}

}  // namespace fastattn
