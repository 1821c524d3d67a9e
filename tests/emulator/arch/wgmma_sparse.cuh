// Hopper's warpgroup product with a 2:4 sparse left operand: as arch/wgmma.cuh. Metadata are read as late as all else.
#pragma once

#include "arch/wgmma.cuh"

namespace emulator {

// Of T: __half, __nv_bfloat16, __nv_fp8_e4m3 or int8_t.
template <typename T>
void compute_sparse_product(const Product* const (&lanes)[32], int first_row);

}  // namespace emulator

namespace fastattn {

template <typename Words>
void pin_metadata(Words&) {}

template <typename T, int N>
struct SparseWgmma {
  template <int SELECTOR>
  static void ss(emulator::SumOf<T> (&d)[N / 8][4], uint64_t a, uint64_t b, const uint32_t& metadata, int scale_d) {
    static_assert(SELECTOR == 0 || (SELECTOR == 1 && sizeof(T) == 2), "all other selectors are undefined");
    emulator::add_product(
        {emulator::compute_sparse_product<T>, N, d[0], nullptr, a, b, scale_d != 0, &metadata, SELECTOR});
  }
};

}  // namespace fastattn
