// Gated activations (https://arxiv.org/abs/2002.05202): SwiGLU and GeGLU.
//
//   out[r, j] = round(act(x[r, j]) * x[r, N + j])    or, interleaved by eights, of x[r, 16 (j / 8) + j % 8] and + 8
//   act: activation.cuh
//
//   x (rows, 2N), out (rows, N) bf16 or fp16, fp32 arithmetic
//
// Grid: one CTA per (row, piece of up to 256 * VEC columns); a thread makes VEC neighbours. Memory bounds it.
#include <algorithm>

#include "arch/dispatch.h"
#include "arch/fast_divide.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "elementwise/activation.cuh"

namespace fastattn {
namespace {

constexpr int64_t kGatedThreads = 256;

template <typename T, int VEC, Activation ACTIVATION>
__global__ void __launch_bounds__(kGatedThreads)
    gated_activation_kernel(const __grid_constant__ GatedActivationParams p, FastDivide pieces_per_row) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t row_idx = pieces_per_row.divide(blockIdx.x);
  const int32_t piece = blockIdx.x - row_idx * pieces_per_row.divisor;
  const int64_t column = (static_cast<int64_t>(piece) * blockDim.x + threadIdx.x) * VEC;
  if (column >= p.width) return;
  const T* gate = static_cast<const T*>(p.x) + p.x_rows.offset(row_idx) + column;
  int64_t up_distance = p.width;
  if (p.interleaved) {
    const int64_t first = column / 8 * 8;  // of eight
    gate += first;
    up_distance = min(int64_t{8}, p.width - first);
  }
  const Pack<T, VEC> gate_pack = load_pack_early<VEC>(gate), up_pack = load_pack_early<VEC>(gate + up_distance);
  store_pack<VEC>(static_cast<T*>(p.out) + row_idx * p.width + column, gated<ACTIVATION>(gate_pack, up_pack));
}

template <typename T, int VEC>
cudaError_t launch(const GatedActivationParams& p, cudaStream_t stream) {
  const int64_t num_vecs = p.width / VEC;
  const int64_t num_threads = std::min<int64_t>((num_vecs + 31) / 32 * 32, kGatedThreads);
  const int64_t pieces = (num_vecs + num_threads - 1) / num_threads;
  if (p.num_rows > INT32_MAX / pieces) return cudaErrorInvalidConfiguration;
  const auto kernel = p.activation == Activation::kSilu       ? gated_activation_kernel<T, VEC, Activation::kSilu>
                      : p.activation == Activation::kGeluTanh ? gated_activation_kernel<T, VEC, Activation::kGeluTanh>
                                                              : gated_activation_kernel<T, VEC, Activation::kGelu>;
  return launch_kernel_behind(kernel, p.num_rows * pieces, static_cast<int>(num_threads), 0, stream, p,
                              FastDivide(static_cast<int32_t>(pieces)));
}

}  // namespace

cudaError_t gated_activation(const GatedActivationParams& p, cudaStream_t stream) {
  const bool vectors = p.width % 8 == 0 && aligned_rows(p.x, p.x_rows) && aligned_rows(p.out);
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    return vectors ? launch<T, 8>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace fastattn
