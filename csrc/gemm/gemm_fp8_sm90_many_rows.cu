#include "gemm/gemm_sm90.cuh"

namespace fastattn {

template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, false>, 128, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, false>, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, false>, 128, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, false>, 128, 256, true>(const GemmSm90Params&,
                                                                                         cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, false>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, false>, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, false>, 128, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, false>, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, false>, 128, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, false>, 128, 256, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, false>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, false>, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 128, 128, true>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 128, 192, true>(const GemmSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 128, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 128, 256>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__nv_bfloat16, true>, 192, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 128, 128, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 128, 192, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 128, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 128, 256>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Fp8<__half, true>, 192, 224>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
