// Products of e4m3 in blocks of 128 x 128 with a scale each.
#include "gemm/gemm_sm90.cuh"
#include "gemm/gemm_sm90_few_rows.cuh"

namespace fastattn {

#define FEW_ROWS(T, BLOCK_M)                                                                                  \
  template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<T>, BLOCK_M, 64, 2>(const GemmSm90Params&, \
                                                                                       cudaStream_t);
#define MANY_ROWS(T, BLOCK_M, BLOCK_N, TURNS)                                                                 \
  template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<T>, BLOCK_M, BLOCK_N, TURNS>(const GemmSm90Params&, \
                                                                                       cudaStream_t);
#define INSTANTIATE(T)          \
  FEW_ROWS(T, 8)                \
  FEW_ROWS(T, 16)               \
  FEW_ROWS(T, 32)               \
  FEW_ROWS(T, 64)               \
  MANY_ROWS(T, 128, 128, false) \
  MANY_ROWS(T, 128, 256, true)  \
  MANY_ROWS(T, 192, 128, false)

INSTANTIATE(__nv_bfloat16)
INSTANTIATE(__half)

}  // namespace fastattn
