// What the operators of dense layers have in common: operands as the kernels see them, and the portable kernels'
// launch.
#pragma once

#include "gemm/gemm_sm80.h"
#include "gemm/gemm_sm90.h"
#include "torch/checks.h"

namespace fastattn {

// Rows of an operand, the last dimension contiguous.
struct Matrix {
  const void* data;
  int64_t num_rows, num_columns, stride;  // in elements
  int64_t element_bytes;

  // Every row begins, and the last one ends, at a multiple of 16 bytes.
  bool aligned() const;
  // The same, of a size that it knows and without rows that overlap.
  bool fits_copy_engine() const;
};

Matrix matrix_of(const Tensor& t);  // (rows, columns)

// Whether gemm_sm90.h has the call, whose out is contiguous. of_columns: what it reads N numbers of, 8 bytes
// at a time.
bool fits_gemm_sm90(const Matrix& x, const Matrix& weight, std::initializer_list<MaybeTensor> of_columns,
                    const Tensor& out);

// What both kernels want to know.
template <typename Params>
Params gemm_params_of(const Matrix& x, const Matrix& weight, const MaybeTensor& bias, Tensor& out) {
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

// Chooses the tile and launches on p, which is complete but for config and workspace. units: K in 16-bit units of x.
void run_gemm_sm80(const char* op, GemmSm80Params& p, bool rows_aligned, int64_t units, ScalarType sum_dtype,
                   const Tensor& x, cudaError_t (*launch)(const GemmSm80Params&, cudaStream_t),
                   bool batch_invariant = false);

}  // namespace fastattn
