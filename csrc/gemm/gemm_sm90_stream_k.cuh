// How clusters share tiles in the Hopper GEMMs for many rows: tile by tile, or, with stream-K, the stages of all tiles
// by equal runs, each from its end to its beginning.
//
//     stages      │         tile 0        │         tile 1        │         tile 2        │
//     clusters    └────── 0 ──────┴────── 1 ──────┴────── 2 ──────┴────── 3 ──────┴── … ──┘
//     of 1:                        2  ◄───┘ 1 ◄───┘
//
// A run's last tile, unless it ends there, comes first: its sums go to the workspace, and a mark. Who has a tile's end
// comes to it last, waits for the marks of those that have the rest, and adds theirs to its own from the end of K to
// the beginning. It waits for clusters of lower numbers only, which were started before it. Marks are as in
// paged_decode.cuh: launch_id, removed when seen, so that no workspace has to be cleared. The order of all sums follows
// from the shape and the number of SMs: two runs are bitwise equal.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arch/global_memory.cuh"
#include "arch/mbarrier.cuh"

namespace fastattn {

constexpr int kGemmSm90StreamKGroups = 2;  // warp groups of a CTA that have sums

// Which parts of which tiles a cluster multiplies: part after part a tile that is `step` from the one before.
struct GemmSm90Walk {
  int32_t num_stages;  // of a tile
  int32_t first_tile, step, num_parts;
  int32_t first_end, last_begin;  // stages; all other parts are whole tiles

  __device__ static __forceinline__ GemmSm90Walk make(int32_t num_tiles, int32_t num_stages, bool stream_k,
                                                      int32_t cluster, int32_t num_clusters) {
    if (!stream_k) {
      return {num_stages, cluster, num_clusters, (num_tiles - cluster - 1) / num_clusters + 1, num_stages, 0};
    }
    const int32_t begin = run_begin(num_tiles * num_stages, cluster, num_clusters);
    const int32_t last = run_begin(num_tiles * num_stages, cluster + 1, num_clusters) - 1;
    const int32_t first_tile = last / num_stages, last_tile = begin / num_stages;
    return {num_stages, first_tile, -1, first_tile - last_tile + 1, last % num_stages + 1, begin % num_stages};
  }
  // Of all stages, those of a cluster.
  __device__ static __forceinline__ int32_t run_begin(int32_t all_stages, int32_t cluster, int32_t num_clusters) {
    return cluster * (all_stages / num_clusters) + min(cluster, all_stages % num_clusters);
  }

  __device__ __forceinline__ int32_t tile(int32_t part) const { return first_tile + part * step; }
  __device__ __forceinline__ int32_t begin(int32_t part) const { return part == num_parts - 1 ? last_begin : 0; }
  __device__ __forceinline__ int32_t end(int32_t part) const { return part == 0 ? first_end : num_stages; }
};

// What a group has of a tile, NUM_FOURS times four sums a thread, in the workspace: 16 bytes of a thread beside those
// of its neighbours.
template <typename Sum, int NUM_FOURS>
struct GemmSm90HandedSums {
  using Four = std::conditional_t<std::is_same_v<Sum, float>, float4, int4>;
  Four* sums;
  uint64_t* mark;

  template <typename Params>
  __device__ __forceinline__ GemmSm90HandedSums(const Params& p, int32_t cta, int group)
      : sums(reinterpret_cast<Four*>(p.sums) + (int64_t{cta} * kGemmSm90StreamKGroups + group) * (NUM_FOURS * 128) +
             threadIdx.x % 128),
        mark(p.marks + cta * kGemmSm90StreamKGroups + group) {}

  // Some of them, which are the first-th and on.
  template <int FOURS>
  __device__ __forceinline__ void put(const Sum (&values)[FOURS][4], int first = 0) const {
#pragma unroll
    for (int t = 0; t < FOURS; ++t) {
      sums[(first + t) * 128] = {values[t][0], values[t][1], values[t][2], values[t][3]};
    }
  }
  // That all of them are there, by a barrier of the group.
  __device__ __forceinline__ void hand_on(uint64_t launch_id, int barrier) const {
    named_barrier_sync(barrier, 128);
    if (threadIdx.x % 128 == 0) store_release(mark, launch_id);
  }

  __device__ __forceinline__ void await(uint64_t launch_id, int barrier) const {
    if (threadIdx.x % 128 == 0) {
      while (load_acquire(mark) != launch_id) {
      }
      *mark = 0;
    }
    named_barrier_sync(barrier, 128);
  }
  // The same of `count` CTAs, each `step` behind the one before, all at once.
  template <typename Params>
  __device__ __forceinline__ static void await_all(const Params& p, int32_t first_cta, int32_t step, int32_t count,
                                                   int group, int barrier) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x) % 128; i < count; i += 128) {
      uint64_t* const mark = p.marks + (first_cta + i * step) * kGemmSm90StreamKGroups + group;
      while (load_acquire(mark) != p.launch_id) {
      }
      *mark = 0;
    }
    named_barrier_sync(barrier, 128);
  }
  template <int AT_ONCE = 8, int FOURS>
  __device__ __forceinline__ void add_to(Sum (&values)[FOURS][4], int first = 0) const {
    constexpr int BATCH = FOURS < AT_ONCE ? FOURS : AT_ONCE;  // on their way at the same time
#pragma unroll
    for (int begin = 0; begin < FOURS; begin += BATCH) {
      Four others[BATCH];
#pragma unroll
      for (int t = 0; t < BATCH; ++t) others[t] = __ldcg(sums + (first + begin + t) * 128);
#pragma unroll
      for (int t = 0; t < BATCH; ++t) {
        values[begin + t][0] += others[t].x;
        values[begin + t][1] += others[t].y;
        values[begin + t][2] += others[t].z;
        values[begin + t][3] += others[t].w;
      }
    }
  }
};

}  // namespace fastattn
