// bf16 or fp16 times INT4 weights with a scale, and perhaps a zero point, a group. See gemm_sm80.cuh.
#include "gemm/gemm_sm80.cuh"

namespace fastattn {
namespace {

constexpr GemmSm80Instantiation kOfInt4[] = {
    gemm_sm80_instantiation<Int4Operands<__nv_bfloat16>>(DType::kBFloat16),
    gemm_sm80_instantiation<Int4Operands<__half>>(DType::kFloat16),
};

}  // namespace

cudaError_t gemm_int4_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  return launch_gemm_sm80(kOfInt4, params, stream);
}

}  // namespace fastattn
