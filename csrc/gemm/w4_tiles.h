// Weights of 4 bits as checkpoints have them into tiles, as gemm_sm90_w4_many_rows.cuh wants them: for a weight that
// was not put in tiles when it was loaded. The kernel is in w4_tiles.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastattn {

enum class W4Order { kFp4, kInt4, kFp8 };  // of the bits of a word: FP4 and INT4 for x in 16 bits, FP4 for x in e4m3

struct W4TilesParams {
  const uint8_t* packed = nullptr;      // (N, K / 2) bytes of two codes, rows 4-byte aligned
  const uint8_t* scale = nullptr;       // fp4: (N, G) e4m3 with groups of 16, e8m0 with groups of 32; int4: nullptr
  const float* global_scale = nullptr;  // (N) or nullptr
  int64_t packed_stride = 0, scale_stride = 0;
  int64_t group_size = 16;  // or 32
  W4Order order = W4Order::kFp4;
  int64_t n = 0, k = 0;  // multiples of 16 and 64

  uint32_t* tiles = nullptr;         // (N / 16, K / 64, 128)
  uint8_t* scale_tiles = nullptr;    // (N / 16, K / 64, 1024 / group_size)
  float* scaled_globally = nullptr;  // (N), with groups of 32: the global scale of scales that are relative to a row's
};

cudaError_t w4_tiles(const W4TilesParams& params, cudaStream_t stream);

}  // namespace fastattn
