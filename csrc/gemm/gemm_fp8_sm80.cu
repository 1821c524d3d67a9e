// e4m3 times e4m3, by way of fp16, with a scale a row of x and a row of weight; dtype is that of out and bias. See
// gemm_sm80.cuh.
#include "gemm/gemm_sm80.cuh"

namespace fastattn {
namespace {

constexpr GemmSm80Instantiation kOfFp8[] = {
    gemm_sm80_instantiation<Fp8Operands<__nv_bfloat16>>(DType::kBFloat16),
    gemm_sm80_instantiation<Fp8Operands<__half>>(DType::kFloat16),
};

}  // namespace

cudaError_t gemm_fp8_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  return launch_gemm_sm80(kOfFp8, params, stream);
}

cudaError_t gemm_fp8_blocks_plain(const GemmSm80Params& params, cudaStream_t stream) {
  return params.dtype == DType::kBFloat16  ? launch_gemm_fallback<Fp8BlockOperands<__nv_bfloat16>>(params, stream)
         : params.dtype == DType::kFloat16 ? launch_gemm_fallback<Fp8BlockOperands<__half>>(params, stream)
                                           : cudaErrorInvalidValue;
}

}  // namespace fastattn
