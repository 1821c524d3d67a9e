#include "gemm/gemm_sm90.cuh"

namespace fastattn {

template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 64, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 64, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 64, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 64, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 128, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 128, 160>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 128, 192, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 128, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 128, 256>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__nv_bfloat16>, 192, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 64, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 64, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 64, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 64, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 128, 96>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 128, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 128, 160>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 128, 192, true>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 128, 224>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 128, 256>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 192, 128>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 192, 192>(const GemmSm90Params&, cudaStream_t);
template cudaError_t launch_gemm_sm90<GemmSm90Int8<__half>, 192, 224>(const GemmSm90Params&, cudaStream_t);

}  // namespace fastattn
