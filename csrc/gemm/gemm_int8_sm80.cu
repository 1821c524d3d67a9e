// INT8 times INT8 with a scale a row of x and a row of weight, exact int32 sums; dtype is that of out and bias. See
// gemm_sm80.cuh.
#include "gemm/gemm_sm80.cuh"

namespace fastattn {
namespace {

constexpr GemmSm80Instantiation kOfInt8[] = {
    gemm_sm80_instantiation<Int8Operands<__nv_bfloat16>>(DType::kBFloat16),
    gemm_sm80_instantiation<Int8Operands<__half>>(DType::kFloat16),
};

}  // namespace

cudaError_t gemm_int8_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  return launch_gemm_sm80(kOfInt8, params, stream);
}

}  // namespace fastattn
