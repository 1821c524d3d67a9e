// What `linear` with a residual is where the product's kernel does not add it: a CTA has a row, or a part of one.
#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "arch/vec.cuh"
#include "elementwise/add_rows.h"

namespace fastattn {
namespace {

constexpr int kAddThreads = 256;
constexpr int64_t kPartSize = 8 * kAddThreads;  // of a row
constexpr int64_t kSumSize = 32;                // columns whose squares are added up: gemm/gemm_sm90.h

template <typename T>
__global__ void __launch_bounds__(kAddThreads)
    add_rows_kernel(const __grid_constant__ AddRowsParams p, int32_t parts_per_row) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t row = static_cast<int32_t>(blockIdx.x) / parts_per_row;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp_idx = static_cast<int>(threadIdx.x) / 32;
  const int64_t part = static_cast<int32_t>(blockIdx.x) - row * parts_per_row;
  const int64_t first = part * kPartSize + warp_idx * (kPartSize / kAddThreads * 32);  // a warp's columns lie together
  T* const out = static_cast<T*>(p.out) + row * p.row_size;
  const T* const added = static_cast<const T*>(p.rows) + p.of_rows.offset(row);
  float* const squares = p.squares == nullptr ? nullptr : p.squares + row * ((p.row_size + kSumSize - 1) / kSumSize);
#pragma unroll
  for (int i = 0; i < kPartSize / kAddThreads; ++i) {
    const int64_t column = first + i * kSumSize + lane;
    float square = 0.0f;
    if (column < p.row_size) {
      const T value = round_to<T>(to_float(out[column]) + to_float(added[column]));
      out[column] = value;
      square = to_float(value) * to_float(value);
    }
    if (squares == nullptr) continue;
    const float sum = warp_reduce(square, [](float a, float b) { return a + b; });
    if (lane == 0 && column < p.row_size) squares[first / kSumSize + i] = sum;
  }
}

}  // namespace

cudaError_t add_rows(const AddRowsParams& p, cudaStream_t stream) {
  const int64_t parts_per_row = (p.row_size + kPartSize - 1) / kPartSize;
  if (p.num_rows > INT32_MAX / parts_per_row) return cudaErrorInvalidConfiguration;
  return dispatch_half(p.dtype, [&](auto element) {
    return launch_kernel_behind(add_rows_kernel<decltype(element)>, p.num_rows * parts_per_row, kAddThreads, 0, stream,
                                p, static_cast<int32_t>(parts_per_row));
  });
}

}  // namespace fastattn
