// Products of e4m3 in blocks of 128 x 128 with a scale each.
#include "gemm/gemm_sm90.cuh"
#include "gemm/gemm_sm90_few_rows.cuh"

namespace fastattn {

template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__nv_bfloat16>, 8, 64, 2>(const GemmSm90Params&,
                                                                                           cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__nv_bfloat16>, 16, 64, 2>(const GemmSm90Params&,
                                                                                            cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__nv_bfloat16>, 32, 64, 2>(const GemmSm90Params&,
                                                                                            cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__nv_bfloat16>, 64, 64, 2>(const GemmSm90Params&,
                                                                                            cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__nv_bfloat16>, 128, 64, 1>(const GemmSm90Params&,
                                                                                             cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<__nv_bfloat16>, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<__nv_bfloat16>, 128, 256, true>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<__nv_bfloat16>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__half>, 8, 64, 2>(const GemmSm90Params&,
                                                                                    cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__half>, 16, 64, 2>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__half>, 32, 64, 2>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__half>, 64, 64, 2>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Fp8Blocks<__half>, 128, 64, 1>(const GemmSm90Params&,
                                                                                      cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<__half>, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<__half>, 128, 256, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8Blocks<__half>, 192, 128>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
