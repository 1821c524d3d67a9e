// Hopper's warpgroup matrix product. Nothing is done when it is issued: operands are read, from shared memory and from
// registers, and accumulators written when it is waited for, as late as the hardware may.
#pragma once

#include "arch/mbarrier.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma_descriptor.cuh"

namespace emulator {

// One product as a thread has issued it.
struct Product {
  // For the 16 rows of a warp, given what each of its lanes has issued.
  void (*compute)(const Product* const (&lanes)[32], int first_row);
  int num_columns;                 // N
  void* acc;                       // (N / 8, 4) of SumOf
  const uint32_t* a_in_registers;  // (4) or nullptr
  uint64_t a, b;
  bool accumulates;
  const uint32_t* metadata = nullptr;  // of sparse ones, a register
  int selector = 0;
};

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

void add_product(const Product& product);
void commit_products();
// Those of a warp, but for the last groups; its 32 lanes must have issued the same.
void wait_for_products(size_t num_pending);

// Of T: __half, __nv_bfloat16, __nv_fp8_e4m3 or int8_t, the last two K-major only.
template <typename T, bool A_MN_MAJOR, bool B_MN_MAJOR>
void compute_product(const Product* const (&lanes)[32], int first_row);

}  // namespace emulator

namespace fastattn {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::commit_products(); }

template <int PENDING>
void wgmma_wait() {
  emulator::wait_for_products(PENDING);
}

template <typename Registers>
void pin_registers(Registers&) {}

template <typename T, int N>
struct Wgmma {
  static constexpr bool kFp8 = sizeof(T) == 1;  // which has operands K-major only

  static void ss(emulator::SumOf<T> (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {
    emulator::add_product({emulator::compute_product<T, false, false>, N, d[0], nullptr, a, b, scale_d != 0});
  }
  static void ss_mn(float (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {
    emulator::add_product({emulator::compute_product<T, true, true>, N, d[0], nullptr, a, b, scale_d != 0});
  }
  static void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int scale_d) {
    emulator::add_product({emulator::compute_product<T, false, !kFp8>, N, d[0], a, 0, b, scale_d != 0});
  }
  static void rs_k(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int scale_d) {
    emulator::add_product({emulator::compute_product<T, false, false>, N, d[0], a, 0, b, scale_d != 0});
  }
};

}  // namespace fastattn
