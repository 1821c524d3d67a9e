// One row of a matrix, spread over the threads of a CTA: read from memory once, visited as often as a norm needs.
//
//   vector i of thread t covers the elements from (i * blockDim.x + t) * VEC on
//   i < kCached stays in registers, in 16 bits; what a very long row has beyond that is read again at each visit
#pragma once

#include "arch/vec.cuh"

namespace fastattn {

template <typename T, int VEC>
struct RowCache {
  static constexpr int kCached = VEC == 1 ? 8 : 2;
  using Vec = Pack<T, VEC>;
  Vec cached[kCached];

  // load(vec_idx) brings what is to be cached; nothing waits for it yet.
  template <typename Load>
  __device__ __forceinline__ void fill(int64_t num_vecs, Load load) {
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
      const int64_t vec_idx = i * blockDim.x + threadIdx.x;
      if (vec_idx < num_vecs) cached[i] = load(vec_idx);
    }
  }

  // use(slot, vec_idx, vector) sees every vector of the row, and may change those that stay; load(vec_idx) brings the
  // others.
  template <typename Load, typename Use>
  __device__ __forceinline__ void visit(int64_t num_vecs, Load load, Use use) {
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
      const int64_t vec_idx = i * blockDim.x + threadIdx.x;
      if (vec_idx < num_vecs) use(i, vec_idx, cached[i]);
    }
    for (int64_t vec_idx = kCached * blockDim.x + threadIdx.x; vec_idx < num_vecs; vec_idx += blockDim.x) {
      Vec vec = load(vec_idx);
      use(kCached, vec_idx, vec);
    }
  }

  // The vector of that slot and index, in another row's visit.
  template <typename Load>
  __device__ __forceinline__ Vec at(int slot, int64_t vec_idx, Load load) const {
    return slot < kCached ? cached[slot] : load(vec_idx);
  }
};

// Enough threads that a row fits into the registers, and no more than it has vectors.
inline unsigned row_cache_threads(int64_t num_vecs, int cached) {
  const auto warps = [](int64_t n) { return static_cast<unsigned>((n + 31) / 32 * 32); };
  if (num_vecs <= 256) return num_vecs < 32 ? 32 : warps(num_vecs);
  const int64_t wanted = (num_vecs + cached - 1) / cached;
  return wanted <= 256 ? 256 : wanted >= 1024 ? 1024 : warps(wanted);
}

}  // namespace fastattn
