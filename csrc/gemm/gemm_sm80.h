// out = x weight^T + bias for sm_80 and later, with weights in 16, 8 or 4 bits. The mainloop is in gemm_sm80.cuh, what
// the operands are made of in gemm_operands_sm80.cuh, and each kind has a .cu with its table of instantiations.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/fast_divide.h"
#include "gemm/gemm_sm80_config.h"

namespace fastattn {

// T: bf16 or fp16, as dtype says. Strides count what the tensor is stored in: T, int8, e4m3, or bytes of two 4-bit
// codes. Rows (the last dimension) are contiguous. G groups of group_size columns have a scale each, the last one may
// be shorter.
struct GemmSm80Params {
  const void* x = nullptr;       // (M, K) T; int8: int8; fp8: e4m3
  const void* weight = nullptr;  // (N, K) T; int8: int8; fp8: e4m3; int4, fp4: (N, K / 2 rounded up), the even column
                                 // in the low half
  const void* bias = nullptr;    // (N) T or nullptr
  void* out = nullptr;           // (M, N) T, contiguous
  void* workspace = nullptr;     // (splits, M, N) fp32, int8: int32, if config.num_splits > 1

  const float* x_scale = nullptr;                       // int8, fp8: (M)
  const int32_t* x_zero_point = nullptr;                // int8: (M) or nullptr, the stride that of x_scale
  const int32_t* weight_code_sum = nullptr;             // int8 with x_zero_point: (N), of each row of weight
  const void* weight_scale = nullptr;                   // int8, fp8: (N) fp32; int4: (N, G) T; fp4: (N, G) e4m3 or e8m0
  const int8_t* zero_point = nullptr;                   // int4: (N, G) or nullptr, -8 ... 7
  const float* global_scale = nullptr;                  // fp4: (N) or nullptr
  int64_t x_scale_stride = 1, weight_scale_stride = 1;  // int8, fp8: 0 where one scale is that of all rows
  int64_t scale_stride = 0;
  int64_t zero_point_stride = 0;
  FastDivide group_size = {};

  int64_t m = 0, n = 0, k = 0;
  int64_t x_stride = 0;
  int64_t weight_stride = 0;

  DType dtype = DType::kBFloat16;
  GemmConfig config = {};  // from gemm_sm80_config
};

// Each enqueues the kernel, and the sum of the splits if there are several. Needs M > 0 and N > 0; K may be 0.
// cudaErrorInvalidValue for a dtype that is not bfloat16 or float16.
cudaError_t gemm_sm80(const GemmSm80Params& params, cudaStream_t stream);
// Sums fit int32: K < 2^17, with zero points K < 2^16.
cudaError_t gemm_int8_sm80(const GemmSm80Params& params, cudaStream_t stream);
cudaError_t gemm_fp8_sm80(const GemmSm80Params& params, cudaStream_t stream);
// With a scale for 128 columns of a row of x, (K / 128 rounded up, M), and one for 128 x 128 of weight, (N / 128, K /
// 128 rounded up), the strides those of their rows. By the plain kernel only, of any size and alignment.
cudaError_t gemm_fp8_blocks_plain(const GemmSm80Params& params, cudaStream_t stream);
cudaError_t gemm_int4_sm80(const GemmSm80Params& params, cudaStream_t stream);
cudaError_t gemm_nvfp4_sm80(const GemmSm80Params& params, cudaStream_t stream);  // groups of 16, e4m3
cudaError_t gemm_mxfp4_sm80(const GemmSm80Params& params, cudaStream_t stream);  // groups of 32, e8m0

}  // namespace fastattn
