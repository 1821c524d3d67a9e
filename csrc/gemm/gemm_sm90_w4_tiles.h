// out = x weight^T + bias for Hopper with few rows of x and a weight of 4 bits in tiles (fastattn/reference/w4_tiles.py).
// Each format has a .cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/fast_divide.h"
#include "gemm/gemm_sm90_w4_tiles_config.h"

namespace fastattn {

// T: bf16 or fp16, as dtype says.
struct GemmSm90W4TilesParams {
  const void* x = nullptr;             // (M, K) T, rows 16-byte aligned and apart
  const void* weight = nullptr;        // (N / 16, K / 64) tiles of 512 bytes, order 16
  // nvfp4: (N / 16, K / 64) tiles of 64 e4m3; mxfp4: of 32 e8m0, at most 133; int4: (N, G) T, G groups of columns.
  const void* weight_scale = nullptr;
  const int8_t* zero_point = nullptr;  // int4: (N, G) or nullptr, -8 ... 7
  int64_t scale_stride = 0, zero_point_stride = 0;  // int4
  FastDivide group_size = {};                       // int4: a multiple of 64, or all of K
  const float* global_scale = nullptr;  // (N) or nullptr
  const void* bias = nullptr;           // (N) T, 8-byte aligned, or nullptr
  void* out = nullptr;                  // (M, N) T, contiguous

  int64_t m = 0, n = 0, k = 0;  // m from 1 to config.block_m, n a multiple of 16, k of 64
  int64_t x_stride = 0;         // elements

  DType dtype = DType::kBFloat16;
  GemmSm90W4TilesConfig config = {};  // from gemm_sm90_w4_tiles_config
};

// Each enqueues the kernel. cudaErrorInvalidValue if no instantiation fits.
cudaError_t gemm_nvfp4_tiles_sm90(const GemmSm90W4TilesParams& params, cudaStream_t stream);
cudaError_t gemm_mxfp4_tiles_sm90(const GemmSm90W4TilesParams& params, cudaStream_t stream);
cudaError_t gemm_int4_tiles_sm90(const GemmSm90W4TilesParams& params, cudaStream_t stream);

}  // namespace fastattn
