// Tensor-core instructions of the sm_80 family, for whole warps at a time.
#pragma once

#include "arch/fragments.cuh"
#include "arch/shared_memory.cuh"

namespace emulator {

struct MatrixRow {
  uint32_t address;
  uint32_t* fragments;  // (4): this lane's
};

// Four 8 x 8 matrices of 16-bit elements between shared memory and fragments. Lane l has the address of row l % 8 of
// matrix l / 8, and of each matrix row l / 4, columns 2 (l % 4) and + 1; transposed, rows and columns change places.
void move_matrices(uint32_t address, uint32_t (&fragments)[4], bool store, bool transposed);

struct FragmentsOfProduct {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// m16n8k16 of T: __half or __nv_bfloat16.
template <typename T>
void compute_product(const FragmentsOfProduct* const* lanes);

}  // namespace emulator

namespace fastattn {

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  emulator::move_matrices(row_address, r, false, false);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  emulator::move_matrices(row_address, r, false, true);
}
inline void store_matrices(uint32_t address, const uint32_t (&fragments)[4]) {
  uint32_t copy[4] = {fragments[0], fragments[1], fragments[2], fragments[3]};
  emulator::move_matrices(address, copy, true, false);
}
inline void store_matrices_trans(uint32_t address, const uint32_t (&fragments)[4]) {
  uint32_t copy[4] = {fragments[0], fragments[1], fragments[2], fragments[3]};
  emulator::move_matrices(address, copy, true, true);
}

inline uint32_t transpose_matrix(uint32_t pair) {
  const std::array<uint32_t, 32> pairs = emulator::exchange(pair);
  const int row = emulator::this_lane() / 4, column = emulator::this_lane() % 4 * 2;
  const auto element = [&](int of_row, int of_column) {
    return pairs[of_row * 4 + of_column / 2] >> (of_column % 2 * 16) & 0xffff;
  };
  return element(column, row) | element(column + 1, row) << 16;
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::FragmentsOfProduct own = {c, a, {b0, b1}};
  emulator::meet(own, emulator::compute_product<T>);
}

}  // namespace fastattn
