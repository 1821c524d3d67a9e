#include "gemm/gemm_sm90.cuh"

namespace fastattn {

using Bf16 = GemmSm90Dense<__nv_bfloat16>;
using Fp16 = GemmSm90Dense<__half>;

template cudaError_t launch_gemm_sm90<Bf16, 64, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 64, 256, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 256, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 64, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 64, 256, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 256, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
