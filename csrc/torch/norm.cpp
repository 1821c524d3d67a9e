#include "norm/layer_norm.h"
#include "norm/rms_norm.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

Tensor run_rms_norm(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight, double eps) {
  const Checks checks(op, "x", x);
  checks.rows("x", x).dtype("x", x, kHalves);
  const int64_t row_size = x.size(x.dim() - 1);
  checks.shape("weight", weight, {row_size}).dtype("weight", weight, {x.scalar_type()});
  if (residual != nullptr) {
    checks.rows("residual", *residual).dtype("residual", *residual, {x.scalar_type()});
    checks.that(shape_of(*residual) == shape_of(x), "residual has another shape than x");
  }
  Tensor out = empty(x, shape_of(x), x.scalar_type());
  if (x.numel() == 0) return out;

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
  check_launch(op, rms_norm(p, stream_of(x)));
  return out;
}

Tensor rms_norm_op(const Tensor& x, const Tensor& weight, double eps) {
  return run_rms_norm("rms_norm", x, nullptr, weight, eps);
}

Tensor add_rms_norm_op(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  return run_rms_norm("add_rms_norm", x, &residual, weight, eps);
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
  m.impl("layer_norm", TORCH_BOX(&layer_norm_op));
}

}  // namespace fastattn
