#include "gemm/fp4_to_fp8.h"
#include "gemm/gemm_sm90_w4_tiles.h"
#include "torch/gemm_workspaces.h"
#include "torch/w4_tiles.h"

namespace fastattn {
namespace {

constexpr const char* kOp = "fp4_fp8_linear";

// On Hopper weights become e4m3 on their way to the tensor cores; elsewhere, and where rows are not aligned, in memory.
Tensor fp4_fp8_linear_op(const Tensor& x, const Tensor& x_scale, const Tensor& weight_packed,
                         const Tensor& weight_scale, const std::optional<Tensor>& global_scale, int64_t group_size,
                         const std::optional<Tensor>& bias, ScalarType out_dtype, bool fast_accum) {
  const Checks checks(kOp, "x", x);
  checks.shape("x", x, {kAny, kAny}).dtype("x", x, {ScalarType::Float8_e4m3fn});
  const int64_t m = x.size(0), k = x.size(1);
  const bool one_x_scale = x_scale.dim() == 1 && x_scale.size(0) == 1;
  checks.shape("x_scale", x_scale, {one_x_scale ? 1 : m}).dtype("x_scale", x_scale, {ScalarType::Float});
  checks.that(group_size == 16 || group_size == 32,
              "group_size is " + std::to_string(group_size) + ", expected 16 or 32");
  const bool tiles = in_tiles(weight_packed);
  if (!tiles) checks.shape("weight_packed", weight_packed, {kAny, ceil_div(k, 2)});
  const int64_t n =
      tiles ? check_w4_tiles(checks, weight_packed, weight_scale, group_size, k, false) : weight_packed.size(0);
  if (!tiles) checks.shape("weight_scale", weight_scale, {n, ceil_div(k, group_size)});
  checks.dtype("weight_packed", weight_packed, {ScalarType::Byte})
      .dtype("weight_scale", weight_scale, {ScalarType::Byte});
  if (global_scale) {
    checks.shape("global_scale", *global_scale, {n}).dtype("global_scale", *global_scale, {ScalarType::Float});
  }
  checks.that(out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Half,
              "out_dtype is another dtype, expected bfloat16 or float16");
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {out_dtype});
  Tensor out = empty(x, {m, n}, out_dtype);
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x);
  const cudaStream_t stream = stream_of(x);
  const Matrix packed{weight_packed.data_ptr(), n, ceil_div(k, 2), tiles ? k / 2 : weight_packed.stride(0), 1};
  const Tensor aligned_x = tiles && !matrix_of(x).fits_copy_engine() ? packed_copy(x) : x;
  const Matrix rows = matrix_of(aligned_x);
  Fp4ToFp8Params convert;
  convert.packed = data<uint8_t>(weight_packed);
  convert.scale = data<uint8_t>(weight_scale);
  convert.global_scale = global_scale ? data<float>(*global_scale) : nullptr;
  convert.packed_stride = packed.stride;
  convert.scale_stride = weight_scale.stride(0);
  convert.group_size = group_size;
  convert.n = n;
  convert.k = k;
  const bool scales_aligned =
      group_size == 32 || (reinterpret_cast<uintptr_t>(convert.scale) | convert.scale_stride) % 2 == 0;

  const double weight_bits = 4.0 + 8.0 / static_cast<double>(group_size);
  const GemmSm90W4Problem problem = {m, n, k, weight_bits, num_sms_of(x), 1, !fast_accum, tiles};
  const bool takes_sm90 = k % 32 == 0 && scales_aligned && fits_gemm_sm90(rows, packed, {bias}, out) &&
                          (problem.fits_many_rows() || fast_accum);
  if (tiles || takes_sm90) {
    auto p = gemm_params_of<GemmSm90W4Params>(rows, packed, bias, out);
    p.k = k;
    p.weight_scale = convert.scale;
    p.scale_stride = convert.scale_stride;
    p.global_scale = convert.global_scale;
    p.x_scale = data<float>(x_scale);
    p.x_scale_stride = one_x_scale ? 0 : 1;
    p.fast_accum = fast_accum;
    const GemmSm90W4TilesConfig few_rows = gemm_sm90_w4_tiles_config(m, n, k, problem.num_sms);
    if (tiles && few_rows.num_ctas > 0 && reinterpret_cast<uintptr_t>(p.bias) % 8 == 0) {
      check_launch(kOp, group_size == 16 ? gemm_nvfp4_fp8_tiles_sm90(p, few_rows, stream)
                                         : gemm_mxfp4_fp8_tiles_sm90(p, few_rows, stream));
      return out;
    }
    p.config = gemm_sm90_w4_config(problem);
    std::optional<W4Tiles> made;
    std::optional<Tensor> row_exponent, row_scale;
    if (p.config.many_rows && !tiles) {
      made = put_in_tiles(kOp, p, W4Order::kFp8, group_size, x);
    } else if (!tiles && group_size == 32) {
      row_exponent = empty(x, {n}, ScalarType::Byte);
      row_scale = empty(x, {n}, ScalarType::Float);
      convert.row_exponent = static_cast<uint8_t*>(row_exponent->data_ptr());
      convert.weight_scale = static_cast<float*>(row_scale->data_ptr());
      check_launch(kOp, fp4_to_fp8(convert, stream));
      p.row_exponent = convert.row_exponent;
      p.row_scale = convert.weight_scale;
    }
    const std::optional<Tensor> workspaces = workspaces_of(p, x);
    check_launch(kOp, group_size == 16 ? gemm_nvfp4_fp8_sm90(p, stream) : gemm_mxfp4_fp8_sm90(p, stream));
    return out;
  }

  const int64_t q_stride = 16 * ceil_div(k, 16);
  Tensor q = empty(x, {n, q_stride}, ScalarType::Float8_e4m3fn);
  Tensor q_scale = empty(x, {n}, ScalarType::Float);
  convert.q = static_cast<uint8_t*>(q.data_ptr());
  convert.q_stride = q_stride;
  convert.weight_scale = static_cast<float*>(q_scale.data_ptr());
  check_launch(kOp, fp4_to_fp8(convert, stream));
  const Matrix columns{q.data_ptr(), n, k, q_stride, 1};
  auto p = gemm_params_of<GemmSm80Params>(rows, columns, bias, out);
  p.x_scale = data<float>(x_scale);
  p.x_scale_stride = one_x_scale ? 0 : 1;
  p.weight_scale = q_scale.data_ptr();
  run_gemm_sm80(kOp, p, rows.aligned() && columns.aligned(), ceil_div(k, 2), ScalarType::Float, x, gemm_fp8_sm80);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("fp4_fp8_linear", TORCH_BOX(&fp4_fp8_linear_op)); }

}  // namespace fastattn
