// Token embedding.
//
//   out[t, :] = round(weight[token_ids[t], :] * scale)      zeros for an id outside 0 … V - 1
//
//   token_ids (T) int32   weight (V, N), out (T, N) bf16 or fp16
//
// Grid: one CTA per (token, piece of up to 128 * VEC columns); a thread makes VEC neighbours. Memory bounds it.
#include <algorithm>

#include "arch/dispatch.h"
#include "arch/fast_divide.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/vec.cuh"
#include "elementwise/embedding.h"

namespace fastattn {
namespace {

constexpr int64_t kMaxThreads = 128;

template <typename T, int VEC>
__global__ void __launch_bounds__(kMaxThreads)
    embedding_kernel(const __grid_constant__ EmbeddingParams p, FastDivide pieces_per_token) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int32_t token_idx = pieces_per_token.divide(blockIdx.x);
  const int32_t piece = blockIdx.x - token_idx * pieces_per_token.divisor;
  const int64_t column = (static_cast<int64_t>(piece) * blockDim.x + threadIdx.x) * VEC;
  if (column >= p.width) return;
  const int64_t token = p.token_ids[token_idx];
  float values[VEC] = {};
  if (token >= 0 && token < p.vocab_size) {
    load_vec<VEC>(static_cast<const T*>(p.weight) + token * p.weight_stride + column, values);
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] *= p.scale;
  }
  store_vec<VEC>(static_cast<T*>(p.out) + token_idx * p.width + column, values);
}

template <typename T, int VEC>
cudaError_t launch(const EmbeddingParams& p, cudaStream_t stream) {
  const int64_t num_vecs = p.width / VEC;
  const int64_t num_threads = std::min<int64_t>((num_vecs + 31) / 32 * 32, kMaxThreads);
  const int64_t pieces = (num_vecs + num_threads - 1) / num_threads;
  if (p.num_tokens > INT32_MAX / pieces) return cudaErrorInvalidConfiguration;
  return launch_kernel_behind(embedding_kernel<T, VEC>, p.num_tokens * pieces, static_cast<int>(num_threads), 0, stream,
                              p, FastDivide(static_cast<int32_t>(pieces)));
}

}  // namespace

cudaError_t embedding(const EmbeddingParams& p, cudaStream_t stream) {
  const bool vectors = p.width % 8 == 0 && aligned_rows(p.weight, {1, p.weight_stride, 0}) && aligned_rows(p.out);
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    return vectors ? launch<T, 8>(p, stream) : launch<T, 1>(p, stream);
  });
}

}  // namespace fastattn
