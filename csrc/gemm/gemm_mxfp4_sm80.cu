// bf16 or fp16 times MXFP4 weights: E2M1, a power of two (e8m0) a group of 32. See gemm_sm80.cuh.
#include "gemm/gemm_sm80.cuh"

namespace fastattn {
namespace {

constexpr GemmSm80Instantiation kOfMxfp4[] = {
    gemm_sm80_instantiation<Mxfp4Operands<__nv_bfloat16>>(DType::kBFloat16),
    gemm_sm80_instantiation<Mxfp4Operands<__half>>(DType::kFloat16),
};

}  // namespace

cudaError_t gemm_mxfp4_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  return launch_gemm_sm80(kOfMxfp4, params, stream);
}

}  // namespace fastattn
