// One row of logits as a distribution, for the CTAs of a cluster, of kNumThreads each: temperature, top-k, top-p,
// min-p, and the draw, without a sort. sample.cu says how; speculative_sample.cu holds two of them against each other.
#pragma once

#include <cmath>
#include <cstdint>

#include "arch/cluster.cuh"
#include "arch/reduce.cuh"
#include "arch/vec.cuh"
#include "sampling/order.cuh"

namespace fastattn {

constexpr int kNumThreads = 1024;
constexpr int kNumWarps = kNumThreads / 32;
constexpr int kDistanceBins = 2 * kNumThreads;
constexpr float kBinsPerUnit = 64.0f;  // bins reach down to e^-32 of the largest probability; the last takes the rest
constexpr int kListSize = 4096;
constexpr int kBatch = 8;                 // loads in flight a thread
constexpr float kOne = 4398046511104.0f;  // 2^42

struct SampleStorage {
  unsigned long long bins[kDistanceBins];
  unsigned long long warp_sums[kNumWarps];
  unsigned long long exchange[2];  // what the other CTAs are to see, in turns
  unsigned long long before;       // what is above the chosen bin
  int chosen;
  int list_size;
  float list[kListSize];
};

__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
  return warp_reduce(value, [](unsigned long long a, unsigned long long b) { return a + b; });
}

// Sum over this lane and the lanes below it.
__device__ __forceinline__ unsigned long long warp_inclusive_sum(unsigned long long value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long lower = __shfl_up_sync(0xffffffffu, value, distance);
    if (threadIdx.x % 32 >= distance) value += lower;
  }
  return value;
}

// Two additions of 32 bits, which shared memory has; of 64 it has none. Sums are exact, whatever their order.
__device__ __forceinline__ void add_to_bin(unsigned long long& bin, unsigned long long value) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(&bin);
  const uint32_t low = static_cast<uint32_t>(value);
  const uint32_t old = atomicAdd(&words[0], low);
  const uint32_t high = static_cast<uint32_t>(value >> 32) + (old + low < old ? 1u : 0u);
  if (high > 0) atomicAdd(&words[1], high);
}

// The CTAs that share a row, all of a cluster; one alone on GPUs without clusters.
struct Team {
  uint32_t rank = 0, num_ctas = 1;
  uint32_t turn = 0;

  __device__ static Team of_cluster() { return {cluster_rank(), cluster_size()}; }

  __device__ __forceinline__ void sync() const {
    if (num_ctas > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }

  // To be called by all threads with the value that their CTA has, the same in each: gives lane i that of CTA i, and
  // `none` to lanes without one. One barrier, since a slot is written again two calls later.
  __device__ __forceinline__ unsigned long long gather(SampleStorage& smem, unsigned long long value,
                                                       unsigned long long none) {
    const uint32_t lane = threadIdx.x % 32;
    if (num_ctas == 1) return lane == 0 ? value : none;
    unsigned long long* const slot = &smem.exchange[turn];
    turn ^= 1;
    if (threadIdx.x == 0) *slot = value;
    cluster_sync();
    return lane < num_ctas ? load_cluster<unsigned long long>(cluster_address(slot, lane)) : none;
  }

  // Over all threads of the team; every thread gets it.
  template <typename Combine>
  __device__ __forceinline__ unsigned long long reduce(SampleStorage& smem, unsigned long long value,
                                                       unsigned long long identity, Combine combine) {
    value = block_reduce(value, identity, combine);
    return num_ctas == 1 ? value : warp_reduce(gather(smem, value, identity), combine);
  }
  __device__ __forceinline__ unsigned long long sum(SampleStorage& smem, unsigned long long value) {
    return reduce(smem, value, 0, [](unsigned long long a, unsigned long long b) { return a + b; });
  }
};

// Finds the last of the bins [0 … NUM_BINS), all CTAs' together, that still has something of the first `bound` in it:
// all bins before it hold less than bound. Leaves it in smem.chosen and what they hold in smem.before. If all bins
// together hold less than bound, it is the last that is not empty. Two bins per thread; a barrier of the team before
// and after.
template <int NUM_BINS>
__device__ __forceinline__ void choose_bin(SampleStorage& smem, const Team& team, unsigned long long bound) {
  team.sync();
  const int lane = threadIdx.x % 32;
  const int warp_idx = threadIdx.x / 32;
  const int bin = 2 * threadIdx.x;
  unsigned long long first = bin < NUM_BINS ? smem.bins[bin] : 0;
  unsigned long long second = bin < NUM_BINS ? smem.bins[bin + 1] : 0;
  if (bin < NUM_BINS) {
    for (uint32_t i = 1; i < team.num_ctas; ++i) {
      const uint32_t address = cluster_address(&smem.bins[bin], (team.rank + i) % team.num_ctas);
      const ulonglong2 others = load_cluster<ulonglong2>(address);
      first += others.x;
      second += others.y;
    }
  }
  const unsigned long long inclusive = warp_inclusive_sum(first + second);
  if (lane == 31) smem.warp_sums[warp_idx] = inclusive;
  if (threadIdx.x == 0) smem.chosen = -1;
  __syncthreads();
  unsigned long long before = warp_sum(lane < warp_idx ? smem.warp_sums[lane] : 0) + inclusive - first - second;
  // At most one thread finds a bin that is not empty, begins under the bound, and either reaches it or is the last.
  const unsigned long long total = warp_sum(smem.warp_sums[lane]);
  const unsigned long long limit = bound < total ? bound : total;
  if (first > 0 && before < limit && before + first >= limit) {
    smem.chosen = bin;
    smem.before = before;
  }
  before += first;
  if (second > 0 && before < limit && before + second >= limit) {
    smem.chosen = bin + 1;
    smem.before = before;
  }
  team.sync();
}

template <typename T>
struct Row {
  const T* logits;
  int32_t vocab_size;
  float temperature;
  const float* list;  // in shared memory: all of this CTA's logits that can still be kept, in any order
  Team team = {};
  int32_t begin = 0, end = vocab_size;  // this CTA's ids
  int32_t list_size = -1;               // -1: there is no list, any logit of the row can be kept
  float peak = 0.0f;

  // The team's CTAs have neighbouring runs of ids in the order of their ranks.
  __device__ __forceinline__ void share(const Team& with) {
    const int32_t num_ctas = static_cast<int32_t>(with.num_ctas), run = (vocab_size + num_ctas - 1) / num_ctas;
    team = with;
    begin = min(static_cast<int32_t>(with.rank) * run, vocab_size);
    end = min(begin + run, vocab_size);
  }

  __device__ __forceinline__ float logit(int32_t id) const { return to_float(logits[id]); }

  // f(id, logit) for every STRIDE-th id. The loads of a batch come first: f has atomics, which no load may pass.
  template <int STRIDE, typename F>
  __device__ __forceinline__ void each(int32_t first, int32_t last, F f) const {
    for (; first < last; first += kBatch * STRIDE) {
      float x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = first + i * STRIDE < last ? logit(first + i * STRIDE) : 0.0f;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * STRIDE < last) f(first + i * STRIDE, x[i]);
      }
    }
  }

  // f(id, logit) for all of this CTA's ids, shared among the threads.
  template <typename F>
  __device__ __forceinline__ void each_id(F f) const {
    each<kNumThreads>(begin + static_cast<int32_t>(threadIdx.x), end, f);
  }

  // f(logit) for all of them that can still be kept.
  template <typename F>
  __device__ __forceinline__ void each_candidate(F f) const {
    if (list_size < 0) {
      each_id([&](int32_t, float x) { f(x); });
    } else {
      for (int32_t i = threadIdx.x; i < list_size; i += kNumThreads) f(list[i]);
    }
  }

  // exp((x - peak) / temperature) in fixed point; the peak is 1, also if it is +inf or the temperature is tiny.
  __device__ __forceinline__ float probability(float x) const {
    return x == peak ? 1.0f : expf((x - peak) / temperature);
  }
  __device__ __forceinline__ unsigned long long weight(float x) const {
    return static_cast<unsigned long long>(probability(x) * kOne + 0.5f);
  }
  __device__ __forceinline__ int distance_bin(float x) const {
    // 0 for the peak itself; NaN from inf - inf cannot be: then x == peak.
    if (x == peak) return 0;
    return static_cast<int>(fminf((peak - x) * kBinsPerUnit, static_cast<float>(kDistanceBins - 1)));
  }
};

// The smallest logit, as ordered(x), among those for which the measure of all strictly larger ones is below `bound`
// (at least 1). measure(x) is what a logit adds: 1 for top-k, its weight for top-p, 0 to leave it out. Gives the row
// its list, if it has none yet and there is room for all that are kept.
template <typename T, typename Measure>
__device__ uint32_t last_kept(Row<T>& row, SampleStorage& smem, unsigned long long bound, Measure measure) {
  const auto clear = [&](int num_bins) {  // the team is done with what they hold
    for (int i = threadIdx.x; i < num_bins; i += kNumThreads) smem.bins[i] = 0;
    __syncthreads();
  };
  clear(kDistanceBins);
  row.each_candidate([&](float x) {
    const unsigned long long value = measure(x);
    if (value > 0) add_to_bin(smem.bins[row.distance_bin(x)], value);
  });
  choose_bin<kDistanceBins>(smem, row.team, bound);
  const int distance_bin = smem.chosen;
  bound -= smem.before;

  if (row.list_size < 0) {
    if (threadIdx.x == 0) smem.list_size = 0;
    __syncthreads();
    row.each_candidate([&](float x) {
      if (row.distance_bin(x) > distance_bin) return;
      const int at = atomicAdd(&smem.list_size, 1);
      if (at < kListSize) smem.list[at] = x;
    });
    __syncthreads();
    if (smem.list_size <= kListSize) row.list_size = smem.list_size;
  }

  uint32_t prefix = 0;  // bits of ordered(x), highest first
  for (int shift = 24; shift >= 0; shift -= 8) {
    clear(256);
    const uint32_t known = shift == 24 ? 0 : 0xffffffffu << (shift + 8);
    row.each_candidate([&](float x) {
      if (row.distance_bin(x) != distance_bin) return;
      const uint32_t key = ordered(x);
      if ((key & known) != prefix) return;
      const unsigned long long value = measure(x);
      if (value > 0) add_to_bin(smem.bins[255 - (key >> shift & 255u)], value);  // the largest come first
    });
    choose_bin<256>(smem, row.team, bound);
    prefix |= static_cast<uint32_t>(255 - smem.chosen) << shift;
    bound -= smem.before;
  }
  return prefix;
}

// The first id whose cumulative weight exceeds u / 2^32 of the total, which is not 0: in the CTA that has it, -1 in the
// others. kept(id, x) is what an id weighs whose logit is x, 0 if it is not kept.
template <typename T, typename Kept>
__device__ int32_t draw(Row<T>& row, SampleStorage& smem, uint32_t u, Kept kept) {
  const int lane = threadIdx.x % 32;
  const int warp_idx = threadIdx.x / 32;
  int32_t begin = row.begin;
  int32_t end = row.end;
  unsigned long long target = 0;  // counted from `begin`
  for (bool first = true; first || end - begin > 32; first = false) {
    const int32_t run = ((end - begin + kNumWarps - 1) / kNumWarps + 31) / 32 * 32;  // whole warps, so at least 32 ids
    const int32_t run_begin = begin + warp_idx * run;
    const int32_t run_end = min(run_begin + run, end);
    unsigned long long sum = 0;
    row.template each<32>(run_begin + lane, run_end, [&](int32_t id, float x) { sum += kept(id, x); });
    sum = warp_sum(sum);
    __syncthreads();  // readers of the round before
    if (lane == 0) smem.warp_sums[warp_idx] = sum;
    __syncthreads();
    const unsigned long long inclusive = warp_inclusive_sum(smem.warp_sums[lane]);
    if (first) {
      const unsigned long long own = __shfl_sync(0xffffffffu, inclusive, 31);
      const unsigned long long up_to = warp_inclusive_sum(row.team.gather(smem, own, 0));
      const unsigned long long total = __shfl_sync(0xffffffffu, up_to, 31);
      target = __umul64hi(total, u) << 32 | (total * u) >> 32;  // total * u / 2^32, below total
      target -= __shfl_sync(0xffffffffu, up_to, row.team.rank) - own;
      if (target >= own) return -1;  // wraps around where it is a CTA's before
    }
    const int chosen = __ffs(__ballot_sync(0xffffffffu, inclusive > target)) - 1;
    target -= __shfl_sync(0xffffffffu, inclusive, max(chosen - 1, 0)) * (chosen > 0);
    begin += chosen * run;
    end = min(begin + run, end);
  }
  const int32_t id = begin + lane;
  const unsigned long long inclusive = warp_inclusive_sum(id < end ? kept(id, row.logit(id)) : 0);
  return begin + __ffs(__ballot_sync(0xffffffffu, inclusive > target)) - 1;
}

// The larger, and NaN if either is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The largest logit's first id; -1 for a row with a NaN or without a finite logit. Sets the row's peak. All threads get
// it. Memory bounds this pass: what is not there reads as -inf, which changes nothing, so that loads alone look where
// the row ends.
template <typename T>
__device__ int32_t find_peak(Row<T>& row, SampleStorage& smem) {
  constexpr int kLoads = 12;
  float best = -INFINITY, least_magnitude = INFINITY;
  int32_t best_id = -1;  // this thread's; it meets its ids in ascending order
  for (int32_t first = row.begin + static_cast<int32_t>(threadIdx.x); first < row.end; first += kLoads * kNumThreads) {
    float x[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int32_t id = first + i * kNumThreads;
      x[i] = id < row.end ? row.logit(id) : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (x[i] > best) best_id = first + i * kNumThreads;
      best = max_or_nan(best, x[i]);
      least_magnitude = fminf(least_magnitude, fabsf(x[i]));
    }
  }
  const auto larger = [](unsigned long long a, unsigned long long b) { return a > b ? a : b; };
  const bool has_any = best_id >= 0 || best != best;
  const unsigned long long rank = row.team.reduce(smem, has_any ? ranked(best, best_id) : 0, 0, larger);
  const float peak = ranked_value(rank);
  if (rank == 0 || peak != peak) return -1;
  if (peak == INFINITY) {  // the others may be so too, or -inf
    const auto any = [](unsigned long long a, unsigned long long b) { return a | b; };
    if (row.team.reduce(smem, least_magnitude < INFINITY, 0, any) == 0) return -1;
  }
  row.peak = peak;
  return ranked_id(rank);
}

// The smallest logit, as ordered(x), that top-k and top-p keep; 0 where both are off. Needs the peak.
template <typename T>
__device__ uint32_t limit(Row<T>& row, SampleStorage& smem, int32_t top_k, float top_p) {
  uint32_t smallest = 0;
  if (top_k > 0 && top_k < row.vocab_size) {
    smallest = last_kept(row, smem, top_k, [](float) { return 1ull; });
  }
  if (top_p < 1.0f) {
    const auto top_k_weight = [&](float x) { return ordered(x) >= smallest ? row.weight(x) : 0ull; };
    unsigned long long total = 0;
    row.each_candidate([&](float x) { total += top_k_weight(x); });
    total = row.team.sum(smem, total);
    const double mass = ceil(static_cast<double>(top_p) * static_cast<double>(total));
    smallest = last_kept(row, smem, mass < 1.0 ? 1ull : static_cast<unsigned long long>(mass), top_k_weight);
  }
  return smallest;
}

}  // namespace fastattn
