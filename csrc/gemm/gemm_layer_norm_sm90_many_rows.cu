#include "gemm/gemm_sm90.cuh"

namespace fastattn {

using Bf16 = GemmSm90Normed<__nv_bfloat16, GemmSm90Norm::kLayer>;
using Fp16 = GemmSm90Normed<__half, GemmSm90Norm::kLayer>;

template cudaError_t launch_gemm_sm90<Bf16, 64, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 64, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 64, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 64, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 160>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 192, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 256>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 64, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 64, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 64, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 64, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 160>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 192, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 256>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 224>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
