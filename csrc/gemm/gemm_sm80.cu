// The dense GEMM of sm_80 and later: bf16 or fp16 times the same, fp32 sums. See gemm_sm80.cuh.
#include "gemm/gemm_sm80.cuh"

namespace fastattn {
namespace {

constexpr GemmSm80Instantiation kOf16Bits[] = {
    gemm_sm80_instantiation<DenseOperands<__nv_bfloat16>>(DType::kBFloat16),
    gemm_sm80_instantiation<DenseOperands<__half>>(DType::kFloat16),
};

}  // namespace

cudaError_t gemm_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  return launch_gemm_sm80(kOf16Bits, params, stream);
}

}  // namespace fastattn
