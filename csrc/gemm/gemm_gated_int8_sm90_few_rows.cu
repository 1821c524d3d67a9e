#include "gemm/gemm_sm90_few_rows.cuh"

namespace fastattn {

using Bf16 = GemmSm90Int8<__nv_bfloat16>;
using Fp16 = GemmSm90Int8<__half>;

template cudaError_t launch_gemm_sm90_few_rows<Bf16, 8, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 16, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 32, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 64, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 64, 64, 1, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 128, 64, 1, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 128, 128, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Bf16, 256, 128, 1, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 8, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 16, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 32, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 64, 64, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 64, 64, 1, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 128, 64, 1, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 128, 128, 2, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90_few_rows<Fp16, 256, 128, 1, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
