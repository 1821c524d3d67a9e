// out = x weight^T + bias for Hopper with few rows of x and a weight of 4 bits in tiles (fastattn/reference/w4_tiles.py).
// Each format has a .cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "gemm/gemm_sm90_w4_tiles_config.h"

namespace fastattn {

// T: bf16 or fp16, as dtype says.
struct GemmSm90W4TilesParams {
  const void* x = nullptr;             // (M, K) T, rows 16-byte aligned and apart
  const void* weight = nullptr;        // (N / 16, K / 64) tiles of 512 bytes, order 16
  const void* weight_scale = nullptr;  // nvfp4: (N / 16, K / 64) tiles of 64 e4m3; mxfp4: of 32 e8m0
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

}  // namespace fastattn
