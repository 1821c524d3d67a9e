#include "gemm/gemm_sm90_w4_tiles.h"
#include "torch/gemm_workspaces.h"
#include "torch/w4_tiles.h"

namespace fastattn {
namespace {

using Launch = cudaError_t (*)(const GemmSm80Params&, cudaStream_t);

bool aligned_bytes(const void* base, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride_bytes % 16 == 0;
}

// A quantized weight of 4 bits, how it is laid out, and the kernels for it.
struct FourBitWeight {
  const char* op;
  const Tensor& packed;  // (N, ceil(K / per_element)), or tiles
  int64_t per_element;   // codes to an element of packed
  ScalarType packed_dtype;
  const Tensor& scale;  // (N, G), or tiles
  ScalarType scale_dtype;
  int64_t group_size;
  int64_t span_sm80, span_sm90;  // the fast kernels take groups that are multiples of these
  int64_t scale_alignment;       // of a row of scales, in scales, for sm_90
  Launch sm80;
  cudaError_t (*sm90)(const GemmSm90W4Params&, cudaStream_t);
  cudaError_t (*sm90_tiles)(const GemmSm90W4Params&, const GemmSm90W4TilesConfig&, cudaStream_t);
  cudaError_t (*sm90_some_rows)(const GemmSm90W4Params&, const GemmSm90W4SomeRowsConfig&, cudaStream_t);  // or nullptr

  bool is_int4() const { return packed_dtype == ScalarType::Int; }
};

// What only some formats have: (N, G) int8, and (N) fp32.
struct FourBitExtras {
  const int8_t* zero_point = nullptr;
  int64_t zero_point_stride = 0;
  const float* global_scale = nullptr;
};

// What both kernels want to know, of rows x.
template <typename Params>
Params params_of(const FourBitWeight& w, const FourBitExtras& extras, const Tensor& x,
                 const std::optional<Tensor>& bias, int64_t group_size, Tensor& out) {
  Params p;
  p.x = x.data_ptr();
  p.weight = w.packed.data_ptr();
  p.weight_scale = w.scale.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.zero_point = extras.zero_point;
  p.zero_point_stride = extras.zero_point_stride;
  p.global_scale = extras.global_scale;
  p.m = num_rows_of(x);
  p.n = out.size(-1);
  p.k = shape_of(x).back();
  p.x_stride = rows_of(x).inner_stride;
  p.weight_stride = w.packed.stride(0) * (w.per_element / 2);
  p.scale_stride = w.scale.stride(0);
  p.group_size = FastDivide(static_cast<int32_t>(group_size));
  p.dtype = dtype_of(x);
  return p;
}

// Rows that the copy engine takes: aligned, apart, and fewer than 2^31.
bool fits_copy_engine(const void* base, int64_t num_rows, int64_t row_bytes, int64_t stride_bytes) {
  return aligned_bytes(base, stride_bytes) && (num_rows == 1 || stride_bytes >= row_bytes) && num_rows <= INT32_MAX;
}

// Whether the Hopper kernels take the call.
bool takes_sm90(const FourBitWeight& w, const GemmSm90W4Params& p, int64_t num_groups, const Tensor& x) {
  const bool whole_spans = p.group_size.divisor % w.span_sm90 == 0 || num_groups == 1;
  const bool scales_aligned =
      (reinterpret_cast<uintptr_t>(p.weight_scale) | w.scale.stride(0)) % w.scale_alignment == 0;
  return capability_of(x) == 90 && p.n % 8 == 0 && p.k > 0 && p.k % 64 == 0 && p.k <= INT32_MAX && whole_spans &&
         scales_aligned && reinterpret_cast<uintptr_t>(p.bias) % 8 == 0 &&
         fits_copy_engine(p.x, p.m, 2 * p.k, 2 * p.x_stride) &&
         fits_copy_engine(p.weight, p.n, p.k / 2, p.weight_stride);
}

// extras: checks and gives what is particular to a format, after the shapes are known to fit.
template <typename Extras>
Tensor four_bit_linear(const FourBitWeight& w, const Tensor& x_given, const std::optional<Tensor>& bias,
                       Extras extras) {
  const Checks checks(w.op, "x", x_given);
  checks.rows("x", x_given).dtype("x", x_given, kHalves);
  std::vector<int64_t> shape = shape_of(x_given);
  const int64_t k = shape.back();
  checks.that(w.group_size >= 1, "group_size is " + std::to_string(w.group_size) + ", expected group_size >= 1");
  const int64_t group_size = w.group_size < k ? w.group_size : k > 0 ? k : 1;
  const int64_t num_groups = ceil_div(k, group_size);
  const bool tiles = in_tiles(w.packed);
  if (!tiles) checks.shape("weight_packed", w.packed, {kAny, ceil_div(k, w.per_element)});
  const int64_t n = tiles ? check_w4_tiles(checks, w.packed, w.scale, group_size, k, w.is_int4()) : w.packed.size(0);
  if (!tiles || w.is_int4()) checks.shape("weight_scale", w.scale, {n, num_groups});
  checks.dtype("weight_packed", w.packed, {w.packed_dtype}).dtype("weight_scale", w.scale, {w.scale_dtype});
  if (bias) checks.shape("bias", *bias, {n}).dtype("bias", *bias, {x_given.scalar_type()});
  const FourBitExtras found = extras(checks, n, num_groups);
  shape.back() = n;
  Tensor out = empty(x_given, shape, x_given.scalar_type());
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(x_given);
  // Rows in two runs (a slice of the middle dimension) are packed first: the kernels know one stride. So are those that
  // the copy engine does not take, where nothing else takes the weight.
  const bool in_runs = rows_of(x_given).inner() < num_rows_of(x_given);
  const bool fits =
      fits_copy_engine(x_given.data_ptr(), num_rows_of(x_given), 2 * k, 2 * rows_of(x_given).inner_stride);
  const Tensor x = in_runs || (tiles && !fits) ? packed_copy(x_given) : x_given;
  const bool bias_fits = !bias || reinterpret_cast<uintptr_t>(bias->data_ptr()) % 8 == 0;
  const std::optional<Tensor> its_bias = tiles && !bias_fits ? packed_copy(*bias) : bias;
  auto hopper = params_of<GemmSm90W4Params>(w, found, x, its_bias, group_size, out);
  if (tiles) {
    const GemmSm90W4SomeRowsConfig some = gemm_sm90_w4_some_rows_config(hopper.m, n, k, num_sms_of(x));
    if (w.sm90_some_rows != nullptr && some.num_ctas > 0) {
      check_launch(w.op, w.sm90_some_rows(hopper, some, stream_of(x)));
      return out;
    }
    const GemmSm90W4TilesConfig few = gemm_sm90_w4_tiles_config(hopper.m, n, k, num_sms_of(x));
    if (few.num_ctas > 0) {
      check_launch(w.op, w.sm90_tiles(hopper, few, stream_of(x)));
      return out;
    }
    checks.that(w.sm90_some_rows != nullptr,
                "weight_packed has " + std::to_string(n) + " rows, which are too many with tile_order 8");
  }
  if (tiles || takes_sm90(w, hopper, num_groups, x)) {
    const double weight_bits =
        4.0 + 8.0 * static_cast<double>(w.scale.element_size()) / static_cast<double>(group_size);
    // MXFP4's scales become relative to their row's largest in tiles, and one 2^133 below it would not be exact.
    const bool may_tile = w.is_int4() || group_size != 32;
    hopper.config = gemm_sm90_w4_config({hopper.m, n, k, weight_bits, num_sms_of(x), 2, false, tiles, may_tile});
    std::optional<W4Tiles> made;
    if (hopper.config.many_rows && !tiles) {
      made = put_in_tiles(w.op, hopper, w.is_int4() ? W4Order::kInt4 : W4Order::kFp4, group_size, x);
    }
    const std::optional<Tensor> workspaces = workspaces_of(hopper, x);
    check_launch(w.op, w.sm90(hopper, stream_of(x)));
    return out;
  }

  auto p = params_of<GemmSm80Params>(w, found, x, bias, group_size, out);
  const bool whole_spans = group_size % w.span_sm80 == 0 || num_groups == 1;
  const bool rows_aligned =
      aligned_bytes(p.x, 2 * p.x_stride) && aligned_bytes(p.weight, p.weight_stride) && k % 32 == 0 && whole_spans;
  run_gemm_sm80(w.op, p, rows_aligned, k, ScalarType::Float, x, w.sm80);
  return out;
}

Tensor int4_linear_op(const Tensor& x, const Tensor& weight_packed, const Tensor& weight_scale,
                      const std::optional<Tensor>& zero_point, int64_t group_size, const std::optional<Tensor>& bias) {
  const FourBitWeight weight = {.op = "int4_linear",
                                .packed = weight_packed,
                                .per_element = 8,
                                .packed_dtype = ScalarType::Int,
                                .scale = weight_scale,
                                .scale_dtype = x.scalar_type(),
                                .group_size = group_size,
                                .span_sm80 = 32,
                                .span_sm90 = 64,
                                .scale_alignment = 1,
                                .sm80 = gemm_int4_sm80,
                                .sm90 = gemm_int4_sm90,
                                .sm90_tiles = gemm_int4_tiles_sm90,
                                .sm90_some_rows = gemm_int4_some_rows_sm90};
  return four_bit_linear(weight, x, bias, [&](const Checks& checks, int64_t n, int64_t num_groups) {
    FourBitExtras extras;
    if (!zero_point) return extras;
    checks.shape("zero_point", *zero_point, {n, num_groups}).dtype("zero_point", *zero_point, {ScalarType::Char});
    extras.zero_point = data<int8_t>(*zero_point);
    extras.zero_point_stride = zero_point->stride(0);
    return extras;
  });
}

Tensor fp4_linear_op(const Tensor& x, const Tensor& weight_packed, const Tensor& weight_scale,
                     const std::optional<Tensor>& global_scale, int64_t group_size, const std::optional<Tensor>& bias,
                     int64_t tile_order) {
  const bool nvfp4 = group_size == 16, fours = tile_order == 8;
  const auto tiles = nvfp4 ? gemm_nvfp4_tiles_sm90 : gemm_mxfp4_tiles_sm90;
  const auto some_rows = nvfp4 ? gemm_nvfp4_some_rows_sm90 : gemm_mxfp4_some_rows_sm90;
  const auto tiles_of_fours = nvfp4 ? gemm_nvfp4_tiles_of_fours_sm90 : gemm_mxfp4_tiles_of_fours_sm90;
  const FourBitWeight weight = {.op = "fp4_linear",
                                .packed = weight_packed,
                                .per_element = 2,
                                .packed_dtype = ScalarType::Byte,
                                .scale = weight_scale,
                                .scale_dtype = ScalarType::Byte,
                                .group_size = group_size,
                                .span_sm80 = group_size,
                                .span_sm90 = group_size,
                                .scale_alignment = nvfp4 ? 4 : 2,
                                .sm80 = nvfp4 ? gemm_nvfp4_sm80 : gemm_mxfp4_sm80,
                                .sm90 = nvfp4 ? gemm_nvfp4_sm90 : gemm_mxfp4_sm90,
                                .sm90_tiles = fours ? tiles_of_fours : tiles,
                                .sm90_some_rows = fours ? nullptr : some_rows};
  return four_bit_linear(weight, x, bias, [&](const Checks& checks, int64_t n, int64_t) {
    checks.that(group_size == 16 || group_size == 32,
                "group_size is " + std::to_string(group_size) + ", expected 16 or 32");
    checks.that(tile_order == 16 || (fours && in_tiles(weight_packed)),
                "tile_order is " + std::to_string(tile_order) + ", expected 16, or 8 with weight_packed in tiles");
    checks.that(!fours || num_rows_of(x) <= kMostRowsOfFours,
                "x has " + std::to_string(num_rows_of(x)) + " rows, expected at most " +
                    std::to_string(kMostRowsOfFours) + " with tile_order 8");
    FourBitExtras extras;
    if (!global_scale) return extras;
    checks.shape("global_scale", *global_scale, {n}).dtype("global_scale", *global_scale, {ScalarType::Float});
    extras.global_scale = data<float>(*global_scale);
    return extras;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("int4_linear", TORCH_BOX(&int4_linear_op));
  m.impl("fp4_linear", TORCH_BOX(&fp4_linear_op));
}

}  // namespace fastattn
