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
inline void move_matrices(uint32_t address, uint32_t (&fragments)[4], bool store, bool transposed) {
  if (address % 16 != 0) fail("a matrix row at byte " + std::to_string(address) + ", not aligned");
  const MatrixRow own = {address, fragments};
  meet(own, [&](const MatrixRow* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const int matrix = i / 2, row = lane / 4, column = lane % 4 * 2 + i % 2;
        unsigned char* const element = smem_of(this_rank()) + lanes[matrix * 8 + (transposed ? column : row)]->address +
                                       (transposed ? row : column) * 2;
        char* const in_register = reinterpret_cast<char*>(lanes[lane]->fragments + matrix) + i % 2 * 2;
        if (store) {
          std::memcpy(element, in_register, 2);
        } else {
          std::memcpy(in_register, element, 2);
        }
      }
    }
  });
}

struct FragmentsOfProduct {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

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

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::FragmentsOfProduct own = {c, a, {b0, b1}};
  emulator::meet(own, [](const emulator::FragmentsOfProduct* const* lanes) {
    const auto half = [](uint32_t pair, int idx) {
      return emulator::value_at<T>(reinterpret_cast<const char*>(&pair) + idx * 2);
    };
    float left[16][16], right[16][8];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) {
        left[row][k] = half(lanes[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k % 2);
      }
      for (int column = 0; column < 8; ++column) {
        right[k][column] = half(lanes[column * 4 + k % 8 / 2]->b[k / 8], k % 2);
      }
    }
    for (int row = 0; row < 16; ++row) {
      float sums[8] = {};
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sums[column] += left[row][k] * right[k][column];
      }
      for (int column = 0; column < 8; ++column) {
        lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2] += sums[column];
      }
    }
  });
}

}  // namespace fastattn
