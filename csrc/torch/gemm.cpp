#include "torch/gemm_call.h"

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
  // Rows in two runs (a slice of the middle dimension) are packed first: the kernels know one stride.
  const Tensor x = rows_of(x_given).inner < num_rows_of(x_given) ? packed_copy(x_given) : x_given;
  const Matrix rows{x.data_ptr(), num_rows_of(x), k, rows_of(x).inner_stride, 2}, columns = matrix_of(weight);
  if (fits_gemm_sm90(rows, columns, {bias}, out)) {
    auto p = gemm_params_of<GemmSm90Params>(rows, columns, bias, out);
    p.config = gemm_sm90_config({p.m, n, k, num_sms_of(x)});
    check_launch("linear", gemm_sm90(p, stream_of(x)));
    return out;
  }
  auto p = gemm_params_of<GemmSm80Params>(rows, columns, bias, out);
  run_gemm_sm80("linear", p, rows.aligned() && columns.aligned(), k, ScalarType::Float, x, gemm_sm80);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("linear", TORCH_BOX(&linear_op)); }

}  // namespace fastattn
