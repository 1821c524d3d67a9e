#include "gemm/gemm_sm90_few_rows.cuh"

namespace fastattn {

template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 8, 64, 2>(const GemmSm90Params&,
                                                                                       cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 16, 64, 2>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 32, 64, 2>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 64, 64, 2>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 64, 64, 1>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 128, 64, 1>(const GemmSm90Params&,
                                                                                         cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 128, 128, 2>(const GemmSm90Params&,
                                                                                          cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__nv_bfloat16>, 256, 128, 1>(const GemmSm90Params&,
                                                                                          cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 8, 64, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 16, 64, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 32, 64, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 64, 64, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 64, 64, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 128, 64, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 128, 128, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<GemmSm90Dense<__half>, 256, 128, 1>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
