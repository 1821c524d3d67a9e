#include "norm/layer_norm.h"
#include "norm/rms_norm.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

// scale: where those of an out in 8 bits go, (rows).
Tensor run_rms_norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
                    ScalarType out_dtype, Tensor* scale = nullptr) {
  const Checks checks(op, "x", x);
  checks.rows("x", x).dtype("x", x, kHalves);
  const int64_t row_size = x.size(x.dim() - 1);
  checks.shape("weight", weight, {row_size}).dtype("weight", weight, {x.scalar_type()});
  if (residual != nullptr) {
    checks.rows("residual", *residual).dtype("residual", *residual, {x.scalar_type()});
    checks.that(shape_of(*residual) == shape_of(x), "residual has another shape than x");
  }
  Tensor out = empty(x, shape_of(x), out_dtype);
  if (x.numel() == 0 && (scale == nullptr || scale->numel() == 0)) return out;

  const OnDeviceOf guard(x);
  RmsNormParams p;
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.out = out.data_ptr();
  p.x_rows = rows_of(x);
  if (residual != nullptr) {
    p.residual = residual->data_ptr();
    p.residual_rows = rows_of(*residual);
  }
  p.num_rows = num_rows_of(x);
  p.row_size = row_size;
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x);
  if (scale != nullptr) {
    p.scale = static_cast<float*>(scale->data_ptr());
    p.q_dtype = dtype_of(out);
  }
  check_launch(op, rms_norm(p, stream_of(x)));
  return out;
}

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps) {
  return run_rms_norm("rms_norm", x, nullptr, weight, eps, x.scalar_type());
}

Tensor add_rms_norm_op(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  return run_rms_norm("add_rms_norm", x, &residual, weight, eps, x.scalar_type());
}

std::tuple<Tensor, Tensor> rms_norm_quantize_op(const char* op, const Tensor& x, const std::optional<Tensor>& residual,
                                                const Tensor& weight, double eps, ScalarType q_dtype) {
  const Checks checks(op, "x", x);
  checks.shape("x", x, {kAny, kAny});
  Tensor scale = empty(x, {x.size(0)}, ScalarType::Float);
  return {run_rms_norm(op, x, residual ? &*residual : nullptr, weight, eps, q_dtype, &scale), scale};
}

std::tuple<Tensor, Tensor> rms_norm_quantize_int8_op(const Tensor& x, const std::optional<Tensor>& residual,
                                                     const Tensor& weight, double eps) {
  return rms_norm_quantize_op("rms_norm_quantize_int8", x, residual, weight, eps, ScalarType::Char);
}

std::tuple<Tensor, Tensor> rms_norm_quantize_fp8_op(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const Tensor& weight, double eps) {
  return rms_norm_quantize_op("rms_norm_quantize_fp8", x, residual, weight, eps, ScalarType::Float8_e4m3fn);
}

Tensor layer_norm_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  const Checks checks("layer_norm", "x", x);
  checks.rows("x", x).dtype("x", x, kHalves);
  const int64_t row_size = x.size(x.dim() - 1);
  checks.shape("weight", weight, {row_size}).dtype("weight", weight, {x.scalar_type()});
  if (bias) checks.shape("bias", *bias, {row_size}).dtype("bias", *bias, {x.scalar_type()});
  Tensor out = empty(x, shape_of(x), x.scalar_type());
  if (x.numel() == 0) return out;

  const OnDeviceOf guard(x);
  LayerNormParams p;
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.x_rows = rows_of(x);
  p.num_rows = num_rows_of(x);
  p.row_size = row_size;
  p.eps = static_cast<float>(eps);
  p.dtype = dtype_of(x);
  check_launch("layer_norm", layer_norm(p, stream_of(x)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm_op));
  m.impl("rms_norm_quantize_int8", TORCH_BOX(&rms_norm_quantize_int8_op));
  m.impl("rms_norm_quantize_fp8", TORCH_BOX(&rms_norm_quantize_fp8_op));
  m.impl("layer_norm", TORCH_BOX(&layer_norm_op));
}

}  // namespace fastattn
