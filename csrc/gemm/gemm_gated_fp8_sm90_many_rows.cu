#include "gemm/gemm_sm90.cuh"

namespace fastattn {

using Bf16 = GemmSm90Fp8<__nv_bfloat16, false>;
using Fp16 = GemmSm90Fp8<__half, false>;
using Bf16FastAccum = GemmSm90Fp8<__nv_bfloat16, true>;
using Fp16FastAccum = GemmSm90Fp8<__half, true>;

template cudaError_t launch_gemm_sm90<Bf16, 128, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 128, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16, 192, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 128, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 128, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16, 192, 192, false, GemmSm90Gated>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16FastAccum, 128, 128, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16FastAccum, 128, 192, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16FastAccum, 128, 256, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16FastAccum, 192, 128, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Bf16FastAccum, 192, 192, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16FastAccum, 128, 128, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16FastAccum, 128, 192, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16FastAccum, 128, 256, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16FastAccum, 192, 128, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);
template cudaError_t launch_gemm_sm90<Fp16FastAccum, 192, 192, false, GemmSm90Gated>(const GemmSm90Params&,
                                                                                     cudaStream_t);

}  // namespace fastattn
