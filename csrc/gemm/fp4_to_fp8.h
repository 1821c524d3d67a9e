// Weights of 4 bits as weights in e4m3 with a scale a row, for products with x in e4m3. The kernel is in fp4_to_fp8.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastattn {

// Rows (the last dimension) are contiguous; strides count elements. G = K / group_size, rounded up.
struct Fp4ToFp8Params {
  const uint8_t* packed = nullptr;      // (N, K / 2 rounded up), the even column in the low half
  const uint8_t* scale = nullptr;       // (N, G) e4m3 with groups of 16 (NVFP4), e8m0 with groups of 32 (MXFP4)
  const float* global_scale = nullptr;  // (N) or nullptr
  int64_t packed_stride = 0, scale_stride = 0;
  int64_t group_size = 16;  // or 32
  int64_t n = 0, k = 0;

  // Results, each of which may be nullptr.
  uint8_t* q = nullptr;  // (N, K) e4m3
  int64_t q_stride = 0;
  float* weight_scale = nullptr;    // (N), what multiplies a row's sums
  uint8_t* row_exponent = nullptr;  // (N), with groups of 32: the largest of the row's scales that is a number
};

// Needs N > 0; K may be 0. cudaErrorInvalidValue for another group_size.
cudaError_t fp4_to_fp8(const Fp4ToFp8Params& params, cudaStream_t stream);

}  // namespace fastattn
