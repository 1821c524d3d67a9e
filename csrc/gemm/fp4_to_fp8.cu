// Weights of 4 bits to e4m3, by the formulas of gemm_sm90_w4_operands.cuh:
//
//   NVFP4   q = e4m3(E2M1 * scale / 8)                           weight_scale = 8 / global_scale
//   MXFP4   q = e4m3(E2M1 * 2^(6 + scale - largest of the row))  weight_scale = 2^(largest - 127 - 6) / global_scale
//
// A warp has a row. Where only the largest scales are asked for, which the kernel on Hopper wants before it begins, it
// reads a byte for 32 weights.
#include "arch/e2m1.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "gemm/fp4_to_fp8.h"

namespace fastattn {
namespace {

constexpr int kRows = 8;  // of a CTA

template <int GROUP>
__global__ void __launch_bounds__(32 * kRows) fp4_to_fp8_kernel(const __grid_constant__ Fp4ToFp8Params p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / 32;
  if (row >= p.n) return;
  const uint8_t* const scales = p.scale + row * p.scale_stride;
  int largest = 0;
  if constexpr (GROUP == 32) {
    for (int64_t g = lane; g < (p.k + GROUP - 1) / GROUP; g += 32) {
      if (scales[g] != 255) largest = max(largest, static_cast<int>(scales[g]));
    }
    largest = __reduce_max_sync(0xffffffffu, largest);
  }
  if (lane == 0) {
    if (p.row_exponent != nullptr) p.row_exponent[row] = static_cast<uint8_t>(largest);
    if (p.weight_scale != nullptr) {
      const float factor = GROUP == 16 ? 8.0f : from_e8m0<float>(static_cast<uint8_t>(largest)) * 0x1p-6f;
      p.weight_scale[row] = factor / (p.global_scale != nullptr ? p.global_scale[row] : 1.0f);
    }
  }
  if (p.q == nullptr) return;
  const uint8_t* const packed = p.packed + row * p.packed_stride;
  for (int64_t column = lane; column < p.k; column += 32) {
    const uint8_t bits = scales[column / GROUP];
    // Far below the largest nothing is left in e4m3.
    const uint8_t exponent = static_cast<uint8_t>(bits == 255 ? 255 : max(bits - largest + 127 + 6, 0));
    const float step = GROUP == 16 ? from_e4m3<float>(bits) * 0.125f : from_e8m0<float>(exponent);
    const Pair<__half> pair = e2m1_pair<__half>(packed[column / 2]);
    const float value = static_cast<float>(column % 2 == 0 ? pair.x : pair.y) * step;
    p.q[row * p.q_stride + column] = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
  }
}

}  // namespace

cudaError_t fp4_to_fp8(const Fp4ToFp8Params& p, cudaStream_t stream) {
  if (p.group_size != 16 && p.group_size != 32) return cudaErrorInvalidValue;
  const auto kernel = p.group_size == 16 ? fp4_to_fp8_kernel<16> : fp4_to_fp8_kernel<32>;
  const int64_t num_ctas = (p.n + kRows - 1) / kRows;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch_kernel_behind(kernel, num_ctas, 32 * kRows, 0, stream, p);
}

}  // namespace fastattn
