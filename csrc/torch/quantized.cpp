#include "torch/gemm_call.h"

namespace fastattn {
namespace {

using Launch = cudaError_t (*)(const GemmSm80Params&, cudaStream_t);

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned_bytes(const void* base, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_bytes % 16 == 0;
}

// A quantized weight of 4 bits, and how it is laid out.
struct FourBitWeight {
  const char* op;
  const Tensor& packed;  // (N, ceil(K / per_element))
  int64_t per_element;   // codes to an element of packed
  ScalarType packed_dtype;
  const Tensor& scale;  // (N, G)
  ScalarType scale_dtype;
  int64_t group_size;
  int64_t span;  // the fast kernel takes groups that are multiples of it
};

// fill: sets what is particular to a format, after the shapes are known to fit.
template <typename Fill>
Tensor four_bit_linear(const FourBitWeight& w, const Tensor& x_given, const std::optional<Tensor>& bias, Launch launch,
                       Fill fill) {
  const Checks checks(w.op, "x", x_given);
  checks.rows("x", x_given).dtype("x", x_given, kHalves);
  std::vector<int64_t> shape = shape_of(x_given);
  const int64_t k = shape.back();
  checks.that(w.group_size >= 1, "group_size is " + std::to_string(w.group_size) + ", expected group_size >= 1");
  const int64_t group_size = w.group_size < k ? w.group_size : k > 0 ? k : 1;
  checks.shape("weight_packed", w.packed, {kAny, ceil_div(k, w.per_element)})
      .dtype("weight_packed", w.packed, {w.packed_dtype});
  const int64_t n = w.packed.size(0);
  const int64_t num_groups = ceil_div(k, group_size);
  checks.shape("weight_scale", w.scale, {n, num_groups}).dtype("weight_scale", w.scale, {w.scale_dtype});
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {x_given.scalar_type()});
  GemmSm80Params p;
  fill(checks, p, n, num_groups);
  shape.back() = n;
  Tensor out = empty(x_given, shape, x_given.scalar_type());
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x_given);
  // Rows in two runs (a slice of the middle dimension) are packed first: the kernel knows one stride.
  const Tensor x = rows_of(x_given).inner < num_rows_of(x_given) ? packed_copy(x_given) : x_given;
  p.x = x.data_ptr();
  p.weight = w.packed.data_ptr();
  p.weight_scale = w.scale.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.m = num_rows_of(x);
  p.n = n;
  p.k = k;
  p.x_stride = rows_of(x).inner_stride;
  p.weight_stride = w.packed.stride(0) * (w.per_element / 2);
  p.scale_stride = w.scale.stride(0);
  p.group_size = FastDivide(static_cast<int32_t>(group_size));
  p.dtype = dtype_of(x);
  const bool whole_spans = group_size % w.span == 0 || num_groups == 1;
  const bool rows_aligned =
      aligned_bytes(p.x, 2 * p.x_stride) && aligned_bytes(p.weight, p.weight_stride) && k % 32 == 0 && whole_spans;
  run_gemm_sm80(w.op, p, rows_aligned, k, ScalarType::Float, x, launch);
  return out;
}

Tensor int4_linear_op(const Tensor& x, const Tensor& weight_packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& zero_point, int64_t group_size, const std::optional<Tensor>& bias) {
  const FourBitWeight weight = {"int4_linear", weight_packed,   8,          ScalarType::Int,
                                weight_scale,  x.scalar_type(), group_size, 32};
  return four_bit_linear(
      weight, x, bias, gemm_int4_sm80, [&](const Checks& checks, GemmSm80Params& p, int64_t n, int64_t num_groups) {
        if (!zero_point) return;
        checks.shape("zero_point", *zero_point, {n, num_groups}).dtype("zero_point", *zero_point, {ScalarType::Char});
        p.zero_point = data<int8_t>(*zero_point);
        p.zero_point_stride = zero_point->stride(0);
      });
}

Tensor fp4_linear_op(const Tensor& x, const Tensor& weight_packed, const Tensor& weight_scale,
                     const std::optional<Tensor>& global_scale, int64_t group_size, const std::optional<Tensor>& bias) {
  const FourBitWeight weight = {"fp4_linear", weight_packed,    2,          ScalarType::Byte,
                                weight_scale, ScalarType::Byte, group_size, group_size};
  return four_bit_linear(
      weight, x, bias, group_size == 16 ? gemm_nvfp4_sm80 : gemm_mxfp4_sm80,
      [&](const Checks& checks, GemmSm80Params& p, int64_t n, int64_t) {
        checks.that(group_size == 16 || group_size == 32,
                    "group_size is " + std::to_string(group_size) + ", expected 16 or 32");
        if (!global_scale) return;
        checks.shape("global_scale", *global_scale, {n}).dtype("global_scale", *global_scale, {ScalarType::Float});
        p.global_scale = data<float>(*global_scale);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("int4_linear", TORCH_BOX(&int4_linear_op));
  m.impl("fp4_linear", TORCH_BOX(&fp4_linear_op));
}

}  // namespace fastattn
