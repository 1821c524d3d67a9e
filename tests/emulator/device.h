// A GPU's streaming multiprocessor on a CPU, as far as our kernels can tell: included in front of their own sources.
//
// Every thread of a CTA is a fibre, a function call with a stack of its own, and one of them runs at a time, until it
// has to wait. Then the scheduler takes a warp at random. A CTA draws how often each of its warps gets its turn, so
// that in some a producer runs far ahead, and in others it is starved. Lanes of a warp part only where they wait for
// different things. What the hardware does asynchronously is kept in `pending` and done late, in any order. All of it
// follows from one seed.
//
// CTAs run one after the other, those of a cluster together, or of a grid that is launched together, and each begins
// with shared memory full of NaN.
//
// What cannot be seen here: the order in which writes become visible (memory is sequentially consistent, and fences do
// nothing), time, registers, and what nvcc makes of the source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#undef __align__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH_FEAT_SM90_ALL

namespace emulator {

constexpr int kMaxSmemBytes = 227 * 1024;
constexpr int kMaxClusterSize = 8;
constexpr int kMaxCtas = 10;  // that run together: a grid's that wait for each other may be more than a cluster
}  // namespace emulator
namespace fastattn {
// What kernels declare as extern __shared__, for each CTA that runs.
alignas(1024) inline unsigned char smem_bytes[emulator::kMaxCtas * emulator::kMaxSmemBytes];
}  // namespace fastattn
namespace emulator {
using fastattn::smem_bytes;

inline std::mt19937 random_engine;
inline std::string current_call;  // in words, for whoever has to find out what went wrong

bool chance(int percent);

[[noreturn]] void fail(const std::string& what);

// ---------------------------------------------------------------------------------------------
// Threads

// What a thread waits for: that a counter has another value than before, or something else that is asked for.
struct Condition {
  const uint64_t* counter = nullptr;
  uint64_t before = 0;
  Condition() = default;
  Condition(const uint64_t& c, uint64_t b) : counter(&c), before(b) {}
  virtual bool holds() const { return *counter != before; }
  virtual std::string text() const = 0;
};

struct Fibre {
  bool begun = false, done = false;
  bool at_cluster = false;  // it has come to the cluster's barrier, and not waited there yet
  uint64_t cluster_phase = 0;
  const Condition* waits_for = nullptr;
  // The condition's. It lies on the thread's own stack, where looking at it again and again for each of 2,000 threads
  // took a third of all the time.
  const uint64_t* counter = nullptr;
  uint64_t before = 0;
  static constexpr size_t kStackBytes = 256 * 1024;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  jmp_buf place;

  bool may_run() const {
    if (done || waits_for == nullptr) return !done;
    return counter != nullptr ? *counter != before : waits_for->holds();
  }
};

// What the lanes of a warp show one another: as many as have come, and how often all have.
struct Warp {
  bool steps_aside = false;  // its turn is over although it could go on
  int num_arrived = 0;
  uint64_t num_meetings = 0;
  const void* shown[32];
};

struct NamedBarrier {
  int num_arrived = 0, num_votes = 0;
  uint64_t num_phases = 0;
  bool any_vote = false;  // of the phase before
};

// What runs at a time: a CTA, or a cluster of them, whose threads and warps are numbered through.
struct Cta {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  NamedBarrier barriers[kMaxCtas][16];
  NamedBarrier cluster_barrier;
  std::vector<std::function<void()>> pending;  // what the hardware has still to do
  std::function<void()> body;
  int num_threads = 0, cluster_size = 1;  // threads of each
  int thread_idx = 0;
  int64_t block_idx = 0, num_blocks = 1;  // of the cluster's first
  int num_tickets = 0;                    // see count_up
  int num_polls = 0;
  jmp_buf scheduler;
};
inline Cta cta;
inline std::vector<std::function<void()>> end_of_cta;  // checks

inline Fibre& this_fibre() { return cta.fibres[cta.thread_idx]; }
inline Warp& this_warp() { return cta.warps[cta.thread_idx / 32]; }
inline int this_lane() { return cta.thread_idx % 32; }
inline int this_rank() { return cta.thread_idx / cta.num_threads; }  // in the cluster
inline unsigned char* smem_of(int rank) { return smem_bytes + rank * kMaxSmemBytes; }

// How often each warp has waited for products: all of a group the same number of times.
inline int num_product_waits[kMaxCtas][32];

// swapcontext would ask the kernel for the signal mask each time; it is used to enter a fibre only.
inline void to_scheduler() {
  if (_setjmp(this_fibre().place) == 0) _longjmp(cta.scheduler, 1);
}

// Lets the rest of the warp run, and now and then the other warps.
inline void maybe_step_aside() {
  this_warp().steps_aside = chance(10);
  to_scheduler();
}

inline void wait(const Condition& condition) {
  if (condition.holds()) return;
  Fibre& fibre = this_fibre();
  fibre.waits_for = &condition;
  fibre.counter = condition.counter;
  fibre.before = condition.before;
  to_scheduler();
  this_fibre().waits_for = nullptr;
}

// Nobody may use the memory of a CTA of the cluster that has ended.
void require_running(int rank);

// All CTAs of a grid; body is the kernel with its arguments.
void run_grid(int64_t num_ctas, int cluster_size, int num_threads, int num_smem_bytes, std::function<void()> body);

// What the threads have asked for and not waited for yet, in groups, as cp.async and wgmma count.
template <typename Work>
class WorkInGroups {
 public:
  explicit WorkInGroups(const std::string& name) {
    end_of_cta.push_back([this, name] {
      for (int thread = 0; thread < cta.num_threads * cta.cluster_size; ++thread) {
        Queue& queue = queues_[thread];
        for (const std::vector<Work>& group : queue.groups) {
          if (!group.empty()) fail("a thread ended before its " + name + " did");
        }
        if (!queue.open.empty()) fail("a thread ended with " + name + " that it never committed");
        queue.groups.clear();
      }
    });
  }

  struct Queue {
    std::vector<Work> open;
    std::deque<std::vector<Work>> groups;
  };
  Queue& of_this_thread() { return queues_[cta.thread_idx]; }

  void add(const Work& work) { of_this_thread().open.push_back(work); }
  void commit() {
    Queue& queue = of_this_thread();
    queue.groups.push_back(std::move(queue.open));
    queue.open.clear();
  }

 private:
  std::vector<Queue> queues_{1024 * kMaxCtas};
};

// ---------------------------------------------------------------------------------------------
// Warps and barriers

struct LanesMeet final : Condition {
  const Warp& warp;
  explicit LanesMeet(const Warp& w) : Condition(w.num_meetings, w.num_meetings), warp(w) {}
  std::string text() const override;
};

// Each lane shows a value; the last one to come calls last(values) for all, as the tensor cores take what 32 lanes
// hold. Then all go on.
template <typename T, typename Last>
void meet(const T& value, Last last) {
  Warp& warp = this_warp();
  warp.shown[this_lane()] = &value;
  if (++warp.num_arrived == 32) {
    maybe_step_aside();  // so that there may be much between what the lanes have done and what they do together
    last(reinterpret_cast<const T* const*>(warp.shown));
    warp.num_arrived = 0;
    ++warp.num_meetings;
    maybe_step_aside();  // in any case, they leave in the order of lanes
  } else {
    wait(LanesMeet(warp));
  }
}

// The lanes' values.
template <typename T>
std::array<T, 32> exchange(const T& value) {
  struct Shown {
    T value;
    std::array<T, 32> all;
  } mine = {value, {}};
  Shown* const own = &mine;
  meet(own, [](Shown* const* const* lanes) {
    std::array<T, 32> all;
    for (int from = 0; from < 32; ++from) all[from] = (*lanes[from])->value;
    for (int to = 0; to < 32; ++to) (*lanes[to])->all = all;
  });
  return mine.all;
}

// Counts for a barrier of the SM, which the last of num_threads opens.
void arrive_at_barrier(int barrier, int num_threads);

// And waits; whether any thread has voted for it.
bool sync_at_barrier(int barrier, int num_threads, bool vote = false);

// The cluster's barrier, and its two parts: who waits sees what all have done before they arrived, and no more.
void sync_cluster();
void arrive_at_cluster();
void wait_for_cluster();

// A value that others will change; a loop that waits for that goes through here, no more often than so in all.
void poll(int most = 1'000'000);

// ---------------------------------------------------------------------------------------------
// Values of 8 and 16 bits as the tensor cores read them

template <typename T>
const std::vector<float>& values_of_type() {
  static const std::vector<float> values = [] {
    std::vector<float> all(size_t{1} << (8 * sizeof(T)));
    for (size_t bits = 0; bits < all.size(); ++bits) {
      T value;
      std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
      all[bits] = static_cast<float>(value);
    }
    return all;
  }();
  return values;
}

// What references spend their time in, compiled for speed: x · y, and sums += factor * x.
double dot(const float* x, const float* y, int count);
void add_scaled(double* sums, double factor, const float* x, int count);

template <typename T>
float value_at(const void* address) {
  static const float* const values = values_of_type<T>().data();
  std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t> bits;
  std::memcpy(&bits, address, sizeof(T));
  return values[bits];
}

struct Index {
  unsigned x;
};

}  // namespace emulator

// ---------------------------------------------------------------------------------------------
// CUDA's language

#define threadIdx \
  emulator::Index { static_cast<unsigned>(emulator::cta.thread_idx % emulator::cta.num_threads) }
#define blockIdx \
  emulator::Index { static_cast<unsigned>(emulator::cta.block_idx + emulator::this_rank()) }
#define blockDim \
  emulator::Index { static_cast<unsigned>(emulator::cta.num_threads) }
#define gridDim \
  emulator::Index { static_cast<unsigned>(emulator::cta.num_blocks) }

using std::isinf;
using std::max;
using std::min;

inline void __threadfence() {}
inline void __syncthreads() { emulator::sync_at_barrier(0, emulator::cta.num_threads); }
inline void __syncwarp() {
  const int nothing = 0;
  emulator::meet(nothing, [](auto) {});
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value)[lane & 31];
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange(value)[emulator::this_lane() ^ mask];
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = emulator::this_lane();
  return emulator::exchange(value)[lane < distance ? lane : lane - distance];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const std::array<bool, 32> votes = emulator::exchange(vote);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(votes[i]) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __reduce_add_sync(unsigned, int value) {
  int sum = 0;
  for (int other : emulator::exchange(value)) sum += other;
  return sum;
}
template <typename T>  // int or unsigned
T __reduce_max_sync(unsigned, T value) {
  const std::array<T, 32> values = emulator::exchange(value);
  return *std::max_element(values.begin(), values.end());
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, const T& value) {
  *address = value;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
[[noreturn]] inline void __trap() { emulator::fail("a trap"); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(uint64_t value) { return __builtin_popcountll(value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffffu, b & 0xffffu);
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __vimax3_s32(int a, int b, int c) { return std::max(std::max(a, b), c); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float2int_rn(float x) {
  return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(std::clamp(x, -2e9f, 2e9f)));
}
inline float __expf(float x) { return std::exp(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  const auto fma = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return static_cast<__nv_bfloat16>(std::fma(static_cast<float>(x), static_cast<float>(y), static_cast<float>(z)));
  };
  return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)};
}
