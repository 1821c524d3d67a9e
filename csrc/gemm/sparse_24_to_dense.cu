// A thread has four neighbours of a row, two of which are stored.
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "gemm/sparse_24_to_dense.h"

namespace fastattn {
namespace {

constexpr int kSparseThreads = 256;

// Where the metadata has row n and columns 4 chunk … 4 chunk + 3 (arch/wgmma_sparse.cuh), of `units` of 64 columns.
template <typename E>
__device__ __forceinline__ uint32_t places_of(const uint32_t* metadata, int64_t units, int64_t n, int64_t chunk) {
  const int row = static_cast<int>(n % 16), in_unit = static_cast<int>(chunk % 16);
  const int high = row / 8;
  const int quarter = sizeof(E) == 2 ? in_unit / 4 : in_unit / 8 * 2 + high;
  const int bit = sizeof(E) == 2 ? high * 16 + in_unit % 4 * 4 : in_unit % 8 * 4;
  const int thread = static_cast<int>(n % 128) / 16 * 32 + row % 8 * 4 + quarter;
  return metadata[(n / 128 * units + chunk / 16) * 256 + thread] >> bit;
}

template <typename E>
__global__ void __launch_bounds__(kSparseThreads)
    sparse_24_to_dense_kernel(const __grid_constant__ Sparse24ToDenseParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t idx = int64_t{blockIdx.x} * kSparseThreads + threadIdx.x;
  const int64_t chunks = p.k / 4, n = idx / chunks, chunk = idx % chunks;
  if (n >= p.n) return;
  const uint32_t places = places_of<E>(p.metadata, (p.k + 511) / 512 * 8, n, chunk);
  const E* const stored = static_cast<const E*>(p.stored) + n * p.stored_stride + chunk * 2;
  E* const dense = static_cast<E*>(p.dense) + n * p.dense_stride + chunk * 4;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) dense[i] = i == (places & 3) ? stored[0] : i == (places >> 2 & 3) ? stored[1] : E{0};
}

}  // namespace

cudaError_t sparse_24_to_dense(const Sparse24ToDenseParams& p, cudaStream_t stream) {
  const int64_t num_ctas = (p.n * (p.k / 4) + kSparseThreads - 1) / kSparseThreads;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = p.element_bytes == 2 ? sparse_24_to_dense_kernel<uint16_t> : sparse_24_to_dense_kernel<uint8_t>;
  return launch_kernel_behind(kernel, num_ctas, kSparseThreads, 0, stream, p);
}

}  // namespace fastattn
