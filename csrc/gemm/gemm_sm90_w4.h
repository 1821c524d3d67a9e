// out = x weight^T + bias for Hopper with weights of 4 bits, which become numbers of 16 or 8 bits on their way to the
// tensor cores, in registers: for few rows of x and weights as checkpoints have them (gemm_sm90_w4.cuh), for many and
// weights in tiles (gemm_sm90_w4_many_rows.cuh). Which, and its tile: gemm_sm90_w4_config.h. Each format has a .cu for
// either.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/fast_divide.h"
#include "gemm/gemm_sm90_w4_config.h"

namespace fastattn {

// T: bf16 or fp16, as dtype says. X: T, or e4m3 for those that say so. Rows (the last dimension) are contiguous; those
// of x and weight 16-byte aligned. G groups of group_size columns have a scale each, the last one may be shorter.
struct GemmSm90W4Params {
  const void* x = nullptr;       // (M, K) X
  const void* weight = nullptr;  // (N, K / 2) bytes of two codes, the even column in the low half; of many rows tiles
  const void* bias = nullptr;    // (N) T, 8-byte aligned, or nullptr
  void* out = nullptr;           // (M, N) T, contiguous

  // int4: (N, G) T; nvfp4: (N, G) e4m3, rows 4-byte aligned; mxfp4: (N, G) e8m0, 2-byte. Of many rows FP4's are tiles,
  // and mxfp4's at most 133, or 255.
  const void* weight_scale = nullptr;
  const int8_t* zero_point = nullptr;   // int4: (N, G) or nullptr, -8 ... 7
  const float* global_scale = nullptr;  // fp4: (N) or nullptr
  int64_t scale_stride = 0;
  int64_t zero_point_stride = 0;

  // With x in e4m3.
  const float* x_scale = nullptr;  // (M), or one with stride 0
  int64_t x_scale_stride = 1;
  const uint8_t* row_exponent = nullptr;  // mxfp4: (N), the largest of a row's scales, and what multiplies its sums,
  const float* row_scale = nullptr;       // as gemm/fp4_to_fp8.h finds them; not of many rows
  bool fast_accum = false;                // sums may have the 14 bits of the tensor cores
  FastDivide group_size = {};             // int4: a multiple of 64, or all of K

  int64_t m = 0, n = 0, k = 0;  // each above 0 and below 2^31; n a multiple of 8, k of 64, or 32 with x in e4m3
  int64_t x_stride = 0;         // elements
  int64_t weight_stride = 0;    // bytes

  DType dtype = DType::kBFloat16;
  GemmSm90W4Config config = {};  // from gemm_sm90_w4_config

  // Workspaces if config.stream_k, not initialized.
  float* sums = nullptr;      // config.num_sums()
  uint64_t* marks = nullptr;  // config.num_marks(); 0 at the end

  uint64_t launch_id = 0;  // set by the launch
};

// Each enqueues the kernel that config says, for many rows one of those below. cudaErrorInvalidValue if no
// instantiation fits.
cudaError_t gemm_int4_sm90(const GemmSm90W4Params& params, cudaStream_t stream);
cudaError_t gemm_nvfp4_sm90(const GemmSm90W4Params& params, cudaStream_t stream);  // groups of 16, e4m3
cudaError_t gemm_mxfp4_sm90(const GemmSm90W4Params& params, cudaStream_t stream);  // groups of 32, e8m0

// The same with x in e4m3 and scales of nvfp4 2-byte aligned; few rows with fast_accum only.
cudaError_t gemm_nvfp4_fp8_sm90(const GemmSm90W4Params& params, cudaStream_t stream);
cudaError_t gemm_mxfp4_fp8_sm90(const GemmSm90W4Params& params, cudaStream_t stream);

// Many rows, and a weight in tiles (fastattn/reference/w4_tiles.py): N a multiple of 16, K of 64.
cudaError_t gemm_int4_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream);
cudaError_t gemm_nvfp4_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream);
cudaError_t gemm_mxfp4_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream);
cudaError_t gemm_nvfp4_fp8_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream);
cudaError_t gemm_mxfp4_fp8_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream);

}  // namespace fastattn
