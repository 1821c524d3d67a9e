#include "gemm/gemm_sm80.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

Tensor linear_op(const Tensor& x_given, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Checks checks("linear", "x", x_given);
  checks.rows("x", x_given).dtype("x", x_given, kHalves);
  std::vector<int64_t> shape = shape_of(x_given);
  const int64_t k = shape.back();
  checks.shape("weight", weight, {kAny, k}).dtype("weight", weight, {x_given.scalar_type()});
  const int64_t n = weight.size(0);
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {x_given.scalar_type()});
  shape.back() = n;
  Tensor out = empty(x_given, shape, x_given.scalar_type());
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x_given);
  // Rows in two runs (a slice of the middle dimension) are packed first: the kernel knows one stride.
  const Tensor x = rows_of(x_given).inner < num_rows_of(x_given) ? packed_copy(x_given) : x_given;
  GemmSm80Params p;
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.m = num_rows_of(x);
  p.n = n;
  p.k = k;
  p.x_stride = rows_of(x).inner_stride;
  p.weight_stride = weight.stride(0);
  p.dtype = dtype_of(x);
  const bool rows_aligned =
      aligned_rows(p.x, {1, p.x_stride, 0}) && aligned_rows(p.weight, {1, p.weight_stride, 0}) && k % 8 == 0;
  p.config = gemm_sm80_config({p.m, n, k, rows_aligned, num_sms_of(x)});
  std::optional<Tensor> workspace;
  if (p.config.num_splits > 1) {
    workspace = empty(x, {p.config.num_splits, p.m, n}, ScalarType::Float);
    p.workspace = workspace->data_ptr();
  }
  check_launch("linear", gemm_sm80(p, stream_of(x)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

}  // namespace fastattn
