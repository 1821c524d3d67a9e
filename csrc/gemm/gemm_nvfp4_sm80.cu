// bf16 or fp16 times NVFP4 weights: E2M1, an e4m3 scale a group of 16, an fp32 scale a row. See gemm_sm80.cuh.
#include "gemm/gemm_sm80.cuh"

namespace fastattn {
namespace {

constexpr GemmSm80Instantiation kOfNvfp4[] = {
    gemm_sm80_instantiation<Nvfp4Operands<__nv_bfloat16>>(DType::kBFloat16),
    gemm_sm80_instantiation<Nvfp4Operands<__half>>(DType::kFloat16),
};

}  // namespace

cudaError_t gemm_nvfp4_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  return launch_gemm_sm80(kOfNvfp4, params, stream);
}

}  // namespace fastattn
