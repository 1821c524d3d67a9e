#include "gemm/gemm_sm90_few_rows.cuh"

namespace fastattn {

template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 8, 64, 2>(const GemmSm90Params&,
                                                                                            cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 16, 64, 2>(const GemmSm90Params&,
                                                                                             cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 32, 64, 2>(const GemmSm90Params&,
                                                                                             cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 64, 64, 2>(const GemmSm90Params&,
                                                                                             cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 64, 64, 1>(const GemmSm90Params&,
                                                                                             cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 128, 64, 1>(const GemmSm90Params&,
                                                                                              cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 128, 128, 2>(const GemmSm90Params&,
                                                                                               cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__nv_bfloat16, false>, 256, 128, 1>(const GemmSm90Params&,
                                                                                               cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 8, 64, 2>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 16, 64, 2>(const GemmSm90Params&,
                                                                                      cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 32, 64, 2>(const GemmSm90Params&,
                                                                                      cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 64, 64, 2>(const GemmSm90Params&,
                                                                                      cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 64, 64, 1>(const GemmSm90Params&,
                                                                                      cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 128, 64, 1>(const GemmSm90Params&,
                                                                                       cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 128, 128, 2>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8<__half, false>, 256, 128, 1>(const GemmSm90Params&,
                                                                                        cudaStream_t);

}  // namespace fastattn
