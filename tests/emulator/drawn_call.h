// What the drivers of all kernels draw their calls with.
#pragma once

#include "arch/dtype.h"
#include "device.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------
// Draws

inline std::mt19937 draws;  // apart from random_engine: a call is the same whatever the kernel's threads do

inline int between(int low, int high) {
  return low + static_cast<int>(draws() % static_cast<unsigned>(high - low + 1));
}
inline bool one_in(int n) { return between(1, n) == 1; }
template <typename T>
T pick(std::initializer_list<T> choices) {
  return choices.begin()[between(0, static_cast<int>(choices.size()) - 1)];
}
inline float normal() { return std::normal_distribution<float>()(draws); }

// ---------------------------------------------------------------------------------------------
// Workspaces

// What CTAs of a product hand on, as memory is that nobody cleared.
struct Workspaces {
  std::vector<float> sums;
  std::vector<uint64_t> marks;

  template <typename Params>
  explicit Workspaces(Params& p) : sums(p.config.num_sums(), NAN), marks(p.config.num_marks()) {
    for (uint64_t& mark : marks) mark = draws();
    p.sums = sums.data();
    p.marks = marks.data();
  }
};

// ---------------------------------------------------------------------------------------------
// Types

template <typename T>
struct TypeInfo;
template <>
struct TypeInfo<__nv_bfloat16> {
  static constexpr fastattn::DType kDType = fastattn::DType::kBFloat16;
  static constexpr const char* kName = "bf16";
  using Out = __nv_bfloat16;
  static constexpr double kTolerance = 0x1p-5;  // P and O are rounded to 2^-9, and O is up to about 4
};
template <>
struct TypeInfo<__half> {
  static constexpr fastattn::DType kDType = fastattn::DType::kFloat16;
  static constexpr const char* kName = "fp16";
  using Out = __half;
  static constexpr double kTolerance = 0x1p-8;
};
template <>
struct TypeInfo<__nv_fp8_e4m3> {
  static constexpr fastattn::DType kDType = fastattn::DType::kFloat8E4M3;
  static constexpr const char* kName = "fp8";
  using Out = __nv_bfloat16;
  static constexpr double kTolerance = 0x1p-2;  // P is rounded to 2^-4
};

template <>
struct TypeInfo<int8_t> {
  static constexpr fastattn::DType kDType = fastattn::DType::kInt8;
  static constexpr const char* kName = "int8";
};

// A tensor of values that T can hold, as the kernel and as the reference read it.
template <typename T>
struct Tensor {
  std::vector<T> data;
  std::vector<float> values;

  explicit Tensor(size_t size = 0) : values(size, NAN) {
    if constexpr (std::is_integral_v<T>) {
      data.assign(size, T(-128));
    } else {
      data.assign(size, T(NAN));
    }
  }
  void set(size_t idx, float value) {
    if constexpr (std::is_integral_v<T>) value = std::clamp(std::round(value), -127.0f, 127.0f);
    data[idx] = T(value);
    values[idx] = static_cast<float>(data[idx]);
  }
};

// ---------------------------------------------------------------------------------------------
// What a product must be like

inline void expect_near(int64_t m, int64_t n, double got, double expected, double allowed) {
  if (std::fabs(got - expected) <= allowed) return;
  fail("out[" + std::to_string(m) + ", " + std::to_string(n) + "] is " + std::to_string(got) + ", expected " +
       std::to_string(expected));
}

// Behind its first elements out is as it was filled.
template <typename T>
void expect_untouched_behind(const std::vector<T>& out, size_t size) {
  for (size_t i = size; i < out.size(); ++i) {
    if (!std::isnan(static_cast<float>(out[i]))) fail("a write behind the end of out");
  }
}

template <typename T, typename Launch>
void expect_same_again(std::vector<T>& out, Launch launch) {
  const std::vector<T> first = out;
  std::fill(out.begin(), out.end(), T(NAN));
  launch();
  if (std::memcmp(first.data(), out.data(), first.size() * sizeof(T)) != 0) fail("two runs differ");
}

// ---------------------------------------------------------------------------------------------
// The command line of a driver: FIRST LAST [SIZE], the seeds of the calls, LAST excluded, and of which compiled size
// they are, a head dim or a block (any).
template <typename RunCall>
int run_calls(int argc, char** argv, RunCall run_call) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s FIRST_SEED LAST_SEED [SIZE]\n", argv[0]);
    return 2;
  }
  const int first = std::atoi(argv[1]), last = std::atoi(argv[2]), size = argc > 3 ? std::atoi(argv[3]) : 0;
  for (int seed = first; seed < last; ++seed) {
    draws.seed(static_cast<unsigned>(seed));
    random_engine.seed(static_cast<unsigned>(seed));
    current_call = "seed " + std::to_string(seed);
    run_call(seed, size);
  }
  std::printf("%d calls\n", last - first);
  return 0;
}

}  // namespace emulator
