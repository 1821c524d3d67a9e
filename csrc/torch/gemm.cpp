#include "gemm/gemm_sm80.h"
#include "gemm/gemm_sm90.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

struct Matrix {
  const void* data;
  int64_t num_rows, num_columns, stride;

  bool aligned() const { return aligned_rows(data, {1, stride, 0}) && num_columns % 8 == 0; }
  // Which takes no rows that overlap, and nothing of size 0 or above 2^31.
  bool fits_copy_engine() const {
    return aligned() && num_columns > 0 && (num_rows == 1 || stride >= num_columns) && num_rows <= INT32_MAX &&
           num_columns <= INT32_MAX;
  }
};

// What both kernels want to know.
template <typename Params>
Params params_of(const Matrix& x, const Matrix& weight, const std::optional<Tensor>& bias, Tensor& out) {
  Params p;
  p.x = x.data;
  p.weight = weight.data;
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.m = x.num_rows;
  p.n = weight.num_rows;
  p.k = x.num_columns;
  p.x_stride = x.stride;
  p.weight_stride = weight.stride;
  p.dtype = dtype_of(out);
  return p;
}

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
  const Matrix rows{x.data_ptr(), num_rows_of(x), k, rows_of(x).inner_stride};
  const Matrix columns{weight.data_ptr(), n, k, weight.stride(0)};
  const bool for_copy_engine = rows.fits_copy_engine() && columns.fits_copy_engine() && n % 8 == 0 &&
                               (!bias || reinterpret_cast<uintptr_t>(bias->data_ptr()) % 8 == 0);
  if (for_copy_engine && capability_of(x) == 90) {
    auto p = params_of<GemmSm90Params>(rows, columns, bias, out);
    p.config = gemm_sm90_config({p.m, n, k, num_sms_of(x)});
    check_launch("linear", gemm_sm90(p, stream_of(x)));
    return out;
  }

  auto p = params_of<GemmSm80Params>(rows, columns, bias, out);
  p.config = gemm_sm80_config({p.m, n, k, rows.aligned() && columns.aligned(), num_sms_of(x)});
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
