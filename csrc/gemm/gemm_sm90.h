// out = x weight^T + bias in bf16 or fp16 for Hopper (wgmma, TMA), of operands in 16 or 8 bits. Two kernels:
// gemm_sm90.cuh, and for a few rows, which is mostly a matter of reading the weight, gemm_sm90_few_rows.cuh. Which one,
// and its tile: gemm_sm90_config.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "gemm/gemm_sm90_config.h"

namespace fastattn {

// T: bf16 or fp16, as dtype says. E: the elements of x and weight, T, int8 or e4m3. Strides count elements, multiples
// of 16 bytes; rows (the last dimension) are contiguous and 16-byte aligned.
struct GemmSm90Params {
  const void* x = nullptr;       // (M, K) E
  const void* weight = nullptr;  // (N, K) E
  const void* bias = nullptr;    // (N) T or nullptr, 8-byte aligned
  void* out = nullptr;           // (M, N) T, contiguous

  // Of 8 bits. A stride is 1, or 0 where one scale is that of all rows.
  const float* x_scale = nullptr;       // (M)
  const float* weight_scale = nullptr;  // (N), 8-byte aligned
  int64_t x_scale_stride = 1, weight_scale_stride = 1;
  bool fast_accum = false;  // e4m3, many rows: sums may have the 14 bits of the tensor cores
  // Of int8 whose 0 is another code, both or neither: the sums are of x - x_zero_point.
  const int32_t* x_zero_point = nullptr;     // (M), the stride that of x_scale
  const int32_t* weight_code_sum = nullptr;  // (N), 8-byte aligned, of each row of weight
  // Of e4m3 in blocks: x_scale (K / 128 rounded up, M), weight_scale (N / 128 rounded up, K / 128 rounded up), rows of
  // scales contiguous, the strides those between them.

  int64_t m = 0, n = 0, k = 0;  // each below 2^31; k > 0; n a multiple of 8
  int64_t x_stride = 0;
  int64_t weight_stride = 0;

  DType dtype = DType::kBFloat16;
  GemmSm90Config config = {};  // from gemm_sm90_config

  // Workspaces if config.stream_k, not initialized.
  float* sums = nullptr;      // config.num_sums(), 16-byte aligned
  uint64_t* marks = nullptr;  // config.num_marks(); 0 at the end
  uint64_t launch_id = 0;     // set by the launch

  // Of norms, whose weight and bias are in `weight` and `bias`.
  float eps = 0.0f;
  const float* weight_sum = nullptr;  // (N), 8-byte aligned, of each row of weight: LayerNorm
  float2* row_norms = nullptr;        // workspace of config.num_row_norms, not initialized

  // Of gates: out is (M, N / 2), N a multiple of 16, rows of weight as gemm_sm90_epilogue.cuh says;
  // act(g) = g / (1 + 2^-(gate_linear g + gate_cubic g^3)).
  float gate_linear = 0.0f, gate_cubic = 0.0f;

  // Of RMSNorm, where they are known: sums of the squares of 32 columns of x.
  const float* x_squares = nullptr;  // (M, K / 32 rounded up), contiguous
};

// What makes it SiLU, and GeLU in its tanh form.
inline void set_silu_gate(GemmSm90Params& params) {
  params.gate_linear = 1.4426950408889634f;  // log2(e)
  params.gate_cubic = 0.0f;
}
inline void set_gelu_tanh_gate(GemmSm90Params& params) {
  params.gate_linear = 2.3022081981444355f;  // 2 sqrt(2/pi) log2(e)
  params.gate_cubic = 0.10294323958002842f;  // times 0.044715
}

// Of a head that draws tokens instead of writing logits (gemm_sm90_stores.cuh): `out` is not looked at.
struct GemmSm90SampledParams : GemmSm90Params {
  const float* temperature = nullptr;  // (M); 0: greedy
  const int64_t* seed = nullptr;       // (M)
  const int64_t* position = nullptr;   // (M)
  uint64_t* choices = nullptr;         // (M, config.n_tiles): the best of each tile, for best_choices of gumbel_max.h
  int32_t first_id = 0;                // of the first row of weight, a multiple of 4; first_id + N below 2^31
};

// out = x weight^T + bias + residual, rounded once.
struct GemmSm90AddedParams : GemmSm90Params {
  const void* residual = nullptr;  // (M, N) T, rows 16-byte aligned, in the kernel for few rows 8-byte
  int64_t residual_stride = 0;     // elements
  float* squares = nullptr;        // (M, N / 32 rounded up) or nullptr: sums of the squares of 32 columns of out
};

// Each enqueues the kernel. Needs M > 0 and N > 0. cudaErrorInvalidValue if no instantiation fits.
cudaError_t gemm_sm90(const GemmSm90Params& params, cudaStream_t stream);
// Sums fit int32: K < 2^17, with zero points K < 2^16.
cudaError_t gemm_int8_sm90(const GemmSm90Params& params, cudaStream_t stream);
cudaError_t gemm_fp8_sm90(const GemmSm90Params& params, cudaStream_t stream);
cudaError_t gemm_fp8_blocks_sm90(const GemmSm90Params& params, cudaStream_t stream);  // with scales of 128 x 128
// Of x's rows, normalized. With x_squares their squares are not added up again.
cudaError_t gemm_rms_norm_sm90(const GemmSm90Params& params, cudaStream_t stream);
cudaError_t gemm_layer_norm_sm90(const GemmSm90Params& params, cudaStream_t stream);
cudaError_t gemm_gated_sm90(const GemmSm90Params& params, cudaStream_t stream);
cudaError_t gemm_gated_int8_sm90(const GemmSm90Params& params, cudaStream_t stream);
cudaError_t gemm_gated_fp8_sm90(const GemmSm90Params& params, cudaStream_t stream);  // not in order
cudaError_t gemm_rms_norm_gated_sm90(const GemmSm90Params& params, cudaStream_t stream);
// Few rows only, and in tiles of kGemmSm90MostSampledRows of them at most.
cudaError_t gemm_sampled_sm90(const GemmSm90SampledParams& params, cudaStream_t stream);
cudaError_t gemm_added_sm90(const GemmSm90AddedParams& params, cudaStream_t stream);

}  // namespace fastattn
