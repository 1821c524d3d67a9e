#include "torch/gemm_call.h"

namespace fastattn {

bool Matrix::aligned() const {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0 &&
         num_columns * element_bytes % 16 == 0;
}

bool Matrix::fits_copy_engine() const {
  return aligned() && num_columns > 0 && (num_rows == 1 || stride >= num_columns) && num_rows <= INT32_MAX &&
         num_columns <= INT32_MAX;
}

Matrix matrix_of(const Tensor& t) { return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), is_8bit(t) ? 1 : 2}; }

bool fits_gemm_sm90(const Matrix& x, const Matrix& weight, std::initializer_list<MaybeTensor> of_columns,
                    const Tensor& out) {
  for (const MaybeTensor& t : of_columns) {
    if (t && reinterpret_cast<uintptr_t>(t->data_ptr()) % 8 != 0) return false;
  }
  return x.fits_copy_engine() && weight.fits_copy_engine() && weight.num_rows % 8 == 0 && capability_of(out) == 90;
}

void run_gemm_sm80(const char* op, GemmSm80Params& p, bool rows_aligned, int64_t units, ScalarType sum_dtype,
                   const Tensor& x, cudaError_t (*launch)(const GemmSm80Params&, cudaStream_t), bool batch_invariant) {
  p.config = gemm_sm80_config({p.m, p.n, units, rows_aligned, num_sms_of(x), batch_invariant});
  std::optional<Tensor> workspace;
  if (p.config.num_splits > 1) {
    workspace = empty(x, {p.config.num_splits, p.m, p.n}, sum_dtype);
    p.workspace = workspace->data_ptr();
  }
  check_launch(op, launch(p, stream_of(x)));
}

}  // namespace fastattn
