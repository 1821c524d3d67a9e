#include "gemm/gemm_sm90_few_rows.cuh"

namespace fastattn {

using Bf16 = GemmSm90Dense<__nv_bfloat16>;
using Fp16 = GemmSm90Dense<__half>;

template cudaError_t launch_gemm_sm90_in_order<Bf16, 8, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 8, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 16, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 16, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 32, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 32, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 64, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 64, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Bf16, 128, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 8, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 8, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 16, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 16, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 32, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 32, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 64, 2>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 64, 1>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_in_order<Fp16, 128, 1>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
