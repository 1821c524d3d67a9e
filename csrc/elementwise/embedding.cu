// Token embedding.
//
//   out[t, :] = round(weight[token_ids[t], :] * scale)      zeros for an id outside 0 … V - 1
//
// An id t < 0 stands for drawn[−1 − t], what the step before drew and the host has not seen yet.
//
//   token_ids (T), drawn (R) int32   weight (V, N), out (T, N) bf16 or fp16
//
// Grid: one CTA per (token, piece of up to 256 * 2 * VEC columns); a thread makes VEC neighbours twice, and asks for
// both before it waits. Memory bounds it.
#include <algorithm>

#include "arch/dispatch.h"
#include "arch/fast_divide.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/vec.cuh"
#include "elementwise/embedding.h"

namespace fastattn {
namespace {

constexpr int64_t kEmbeddingThreads = 256;
constexpr int kVecs = 2;  // of a thread

template <typename T, int VEC>
__global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_kernel(const __grid_constant__ EmbeddingParams p, FastDivide pieces_per_token) {
  grid_dependency_launch();
  grid_dependency_wait();
  const int32_t token_idx = pieces_per_token.divide(blockIdx.x);
  const int32_t piece = blockIdx.x - token_idx * pieces_per_token.divisor;
  const int64_t first = (static_cast<int64_t>(piece) * kVecs * blockDim.x + threadIdx.x) * VEC;
  const int64_t step = blockDim.x * VEC;
  int64_t token = p.token_ids[token_idx];
  if (token < 0 && token >= -p.num_drawn) token = p.drawn[-1 - token];
  const bool known = token >= 0 && token < p.vocab_size;
  const T* const row = static_cast<const T*>(p.weight) + token * p.weight_stride;
  T* const out = static_cast<T*>(p.out) + token_idx * p.width;
  Pack<T, VEC> packs[kVecs] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int64_t column = first + i * step;
    if (known && column < p.width) packs[i] = load_pack_early<VEC>(row + column);
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int64_t column = first + i * step;
    if (column >= p.width) break;
    float values[VEC];
    unpack(packs[i], values);
#pragma unroll
    for (float& value : values) value *= p.scale;
    store_vec<VEC>(out + column, values);
  }
}

template <typename T, int VEC>
cudaError_t launch(const EmbeddingParams& p, cudaStream_t stream) {
  const int64_t num_vecs = p.width / VEC;
  const int64_t num_threads = std::min<int64_t>((num_vecs + kVecs * 32 - 1) / (kVecs * 32) * 32, kEmbeddingThreads);
  const int64_t pieces = (num_vecs + kVecs * num_threads - 1) / (kVecs * num_threads);
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
