#include "gemm/gemm_sm90_sparse_24.h"
#include "gemm/sparse_24_to_dense.h"
#include "torch/gemm_workspaces.h"

namespace fastattn {
namespace {

// A product with a 2:4 sparse weight, and the kernels that have it: on Hopper of the weight as it is, elsewhere, and of
// sizes that wgmma does not have, of a dense one.
struct SparseLinear {
  const char* op;
  ScalarType sum_dtype;
  int64_t max_k;
  cudaError_t (*sm90)(const GemmSm90SparseParams&, cudaStream_t);
  cudaError_t (*dense)(const GemmSm80Params&, cudaStream_t);
};

// Of scales, where x has 8 bits.
struct Scales {
  const Tensor &x, &weight;
};

Tensor run_sparse_linear(const SparseLinear& kind, const Tensor& x, const std::optional<Scales>& scales,
                         const Tensor& stored, const Tensor& metadata_given, const MaybeTensor& bias, Tensor out,
                         bool fast_accum) {
  const int64_t m = num_rows_of(x), k = x.size(x.dim() - 1), n = stored.size(0);
  const Checks checks(kind.op, "x", x);
  checks.that(k % 4 == 0, "x has K = " + std::to_string(k) + ", expected a multiple of 4");
  checks.that(k < kind.max_k, "x has K = " + std::to_string(k) + ", expected K < " + std::to_string(kind.max_k));
  checks.shape("values", stored, {n, k / 2}).dtype("values", stored, {x.scalar_type()});
  const int64_t units = ceil_div(k, kGemmSm90SparsePaddedK) * (kGemmSm90SparsePaddedK / kGemmSm90SparseUnitK);
  checks.shape("metadata", metadata_given, {ceil_div(n, kGemmSm90SparseN), units, 256})
      .dtype("metadata", metadata_given, {ScalarType::Int});
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {out.scalar_type()});
  const auto check_scale = [&](const char* name, const Tensor& scale, int64_t rows) {
    const bool is_shared = scale.dim() == 1 && scale.size(0) == 1;
    checks.shape(name, scale, {is_shared ? 1 : rows}).dtype(name, scale, {ScalarType::Float});
    return is_shared ? int64_t{0} : int64_t{1};
  };
  const int64_t x_scale_stride = scales ? check_scale("x_scale", scales->x, m) : 1;
  const int64_t weight_scale_stride = scales ? check_scale("weight_scale", scales->weight, n) : 1;
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x);
  const cudaStream_t stream = stream_of(x);
  const int element_bytes = is_8bit(x) ? 1 : 2;
  const Matrix rows = {x.data_ptr(), m, k, rows_of(x).inner_stride, element_bytes};
  const Matrix halves = {stored.data_ptr(), n, k / 2, stored.stride(0), element_bytes};
  const auto params = [&](auto p, const Matrix& columns) {
    p = gemm_params_of<decltype(p)>(rows, columns, bias, out);
    p.k = k;
    if (scales) {
      p.x_scale = data<float>(scales->x);
      p.weight_scale = data<float>(scales->weight);
    }
    p.x_scale_stride = x_scale_stride;
    p.weight_scale_stride = weight_scale_stride;
    return p;
  };
  const Tensor metadata = metadata_given.is_contiguous() ? metadata_given : packed_copy(metadata_given);
  const auto* const words = static_cast<const uint32_t*>(metadata.data_ptr());
  if (fits_gemm_sm90(rows, halves, {}, out) && reinterpret_cast<uintptr_t>(words) % 16 == 0) {
    auto p = params(GemmSm90SparseParams(), halves);
    p.metadata = words;
    p.fast_accum = fast_accum;
    p.config = gemm_sm90_sparse_config({.m = m,
                                        .n = n,
                                        .k = k,
                                        .num_sms = num_sms_of(x),
                                        .element_bytes = element_bytes,
                                        .two_levels = is_fp8(x) && !fast_accum});
    const auto workspaces = workspaces_of(p, x);
    check_launch(kind.op, kind.sm90(p, stream));
    return out;
  }
  const int64_t unit = 16 / element_bytes, stride = ceil_div(k, unit) * unit;
  Tensor weight = empty(x, {n, stride}, x.scalar_type());
  if (k > 0) {
    Sparse24ToDenseParams p;
    p.stored = halves.data;
    p.metadata = words;
    p.dense = weight.data_ptr();
    p.stored_stride = halves.stride;
    p.dense_stride = stride;
    p.n = n;
    p.k = k;
    p.element_bytes = element_bytes;
    check_launch(kind.op, sparse_24_to_dense(p, stream));
  }
  const Matrix columns = {weight.data_ptr(), n, k, stride, element_bytes};
  auto p = params(GemmSm80Params(), columns);
  run_gemm_sm80(kind.op, p, rows.aligned() && columns.aligned(), element_bytes == 1 ? ceil_div(k, 2) : k,
                kind.sum_dtype, x, kind.dense);
  return out;
}

Tensor sparse_linear_op(const Tensor& x_given, const Tensor& values, const Tensor& metadata,
                        const std::optional<Tensor>& bias) {
  const SparseLinear kind = {"sparse_linear", ScalarType::Float, INT32_MAX, gemm_sparse_sm90, gemm_sm80};
  const Checks checks(kind.op, "x", x_given);
  checks.rows("x", x_given).dtype("x", x_given, kHalves);
  checks.shape("values", values, {kAny, kAny});
  std::vector<int64_t> shape = shape_of(x_given);
  shape.back() = values.size(0);
  // Rows in two runs (a slice of the middle dimension) are packed first: the kernels know one stride.
  const Tensor x = rows_of(x_given).inner() < num_rows_of(x_given) ? packed_copy(x_given) : x_given;
  return run_sparse_linear(kind, x, std::nullopt, values, metadata, bias, empty(x, shape, x.scalar_type()), false);
}

Tensor sparse_8bit_linear(const SparseLinear& kind, ScalarType dtype, const Tensor& x, const Tensor& x_scale,
                          const Tensor& values, const Tensor& metadata, const Tensor& weight_scale,
                          const MaybeTensor& bias, ScalarType out_dtype, bool fast_accum) {
  const Checks checks(kind.op, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, {dtype});
  checks.shape("values", values, {kAny, kAny});
  checks.that(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half,
              "out_dtype is another dtype, expected bfloat16 or float16");
  Tensor out = empty(x, {x.size(0), values.size(0)}, out_dtype);
  return run_sparse_linear(kind, x, Scales{x_scale, weight_scale}, values, metadata, bias, out, fast_accum);
}

Tensor sparse_int8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& values, const Tensor& metadata,
                             const Tensor& weight_scale, const std::optional<Tensor>& bias, ScalarType out_dtype) {
  const SparseLinear kind = {"sparse_int8_linear", ScalarType::Int, 1 << 17, gemm_sparse_int8_sm90, gemm_int8_sm80};
  return sparse_8bit_linear(kind, ScalarType::Char, x, x_scale, values, metadata, weight_scale, bias, out_dtype, false);
}

Tensor sparse_fp8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& values, const Tensor& metadata,
                            const Tensor& weight_scale, const std::optional<Tensor>& bias, ScalarType out_dtype,
                            bool fast_accum) {
  const SparseLinear kind = {"sparse_fp8_linear", ScalarType::Float, INT32_MAX, gemm_sparse_fp8_sm90, gemm_fp8_sm80};
  return sparse_8bit_linear(kind, ScalarType::Float8_e4m3fn, x, x_scale, values, metadata, weight_scale, bias,
                            out_dtype, fast_accum);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("sparse_linear", TORCH_BOX(&sparse_linear_op));
  m.impl("sparse_int8_linear", TORCH_BOX(&sparse_int8_linear_op));
  m.impl("sparse_fp8_linear", TORCH_BOX(&sparse_fp8_linear_op));
}

}  // namespace fastattn
