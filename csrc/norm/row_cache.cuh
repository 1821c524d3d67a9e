// One row of a matrix, spread over the threads of a CTA: read from memory once, visited as often as a norm needs.
//
//   vector i of thread t covers the elements from (i * blockDim.x + t) * VEC on
//   i < kCached stays in registers, in 16 bits; what a LONG row has beyond that is read again at each visit
//
// A CTA has 256 threads for rows of up to 4096, two loads each, and kernels have 32 registers a thread where they can:
// then eight rows are on their way to an SM at once, and 1024 rows on an H100 are one wave. Weights are asked for when
// the row has come and before it is summed up: in front of the row they take registers that hold no row, behind the sum
// they are a second trip to memory. How many threads a row has follows from its length alone, or its sum would have
// other bits in another batch.
//
// Where no row is LONG there is no loop: a few rows take as long as their code takes to arrive.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "arch/vec.cuh"

namespace fastattn {

template <typename Element, int VEC_SIZE, bool LONG>
struct RowCache {
  using T = Element;
  static constexpr int VEC = VEC_SIZE;
  static constexpr bool kLong = LONG;
  static constexpr int kCached = VEC == 1 ? 4 : 2;
  static constexpr int kCtasPerSm = LONG ? 1 : 2;  // of 1024 threads
  using Vec = Pack<T, VEC>;
  using Index = std::conditional_t<LONG, int64_t, int32_t>;  // of a vector of the row
  Vec cached[kCached];

  // load(vec_idx) brings what is to be cached; nothing waits for it yet.
  template <typename Load>
  __device__ __forceinline__ void fill(Index num_vecs, Load load) {
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
      const Index vec_idx = i * blockDim.x + threadIdx.x;
      if (vec_idx < num_vecs) cached[i] = load(vec_idx);
    }
  }

  // use(slot, vec_idx, vector) sees every vector of the row, and may change those that stay; load(vec_idx) brings the
  // others.
  template <typename Load, typename Use>
  __device__ __forceinline__ void visit(Index num_vecs, Load load, Use use) {
#pragma unroll
    for (int i = 0; i < kCached; ++i) {
      const Index vec_idx = i * blockDim.x + threadIdx.x;
      if (vec_idx < num_vecs) use(i, vec_idx, cached[i]);
    }
    if constexpr (LONG) {
      for (Index vec_idx = kCached * blockDim.x + threadIdx.x; vec_idx < num_vecs; vec_idx += blockDim.x) {
        Vec vec = load(vec_idx);
        use(kCached, vec_idx, vec);
      }
    }
  }

  // The vector of that slot and index, in another row's visit.
  template <typename Load>
  __device__ __forceinline__ Vec at(int slot, Index vec_idx, Load load) const {
    return !LONG || slot < kCached ? cached[slot] : load(vec_idx);
  }
};

// f(cache, num_threads): a RowCache for rows of so many elements, and enough threads that a row fits into the
// registers, no more than it has vectors. `vectors`: 8 elements can be loaded at once.
template <typename T, typename F>
cudaError_t with_row_cache(int64_t row_size, bool vectors, F f) {
  constexpr int64_t kMostThreads = 1024, kFewThreads = 256;
  const int64_t num_vecs = vectors ? row_size / 8 : row_size;
  const int64_t cached = vectors ? RowCache<T, 8, false>::kCached : RowCache<T, 1, true>::kCached;
  const int64_t wanted = num_vecs <= kFewThreads ? num_vecs : std::max((num_vecs + cached - 1) / cached, kFewThreads);
  const int num_threads = static_cast<int>(std::clamp<int64_t>((wanted + 31) / 32 * 32, 32, kMostThreads));
  if (!vectors) return f(RowCache<T, 1, true>(), num_threads);
  return num_vecs <= num_threads * cached ? f(RowCache<T, 8, false>(), num_threads)
                                          : f(RowCache<T, 8, true>(), num_threads);
}

}  // namespace fastattn
