// What the tensor cores compute: compiled once for all kernels, with all optimization.
#include "arch/mma_sm80.cuh"
#include "arch/wgmma.cuh"
#include "arch/wgmma_sparse.cuh"
#include "tensor_map.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------
// The sm_80 family's

void move_matrices(uint32_t address, uint32_t (&fragments)[4], bool store, bool transposed) {
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

template <typename T>
void compute_product(const FragmentsOfProduct* const* lanes) {
  const auto half = [](uint32_t pair, int idx) { return value_at<T>(reinterpret_cast<const char*>(&pair) + idx * 2); };
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
}

template void compute_product<__half>(const FragmentsOfProduct* const*);
template void compute_product<__nv_bfloat16>(const FragmentsOfProduct* const*);

// ---------------------------------------------------------------------------------------------
// Hopper's

namespace {

// What a descriptor says of an operand in shared memory.
struct OperandInSmem {
  uint32_t base, leading, stride;
  int row_bytes;

  explicit OperandInSmem(uint64_t descriptor)
      : base((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        row_bytes(descriptor >> 62 == 1 ? 128 : 64) {}

  // 16 bytes of a row, which a swizzle keeps together.
  const unsigned char* chunk(uint32_t row, uint32_t column_bytes) const {
    const uint32_t panel = column_bytes / row_bytes;
    const uint32_t address =
        base + panel * leading + row / 8 * stride + row % 8 * row_bytes + column_bytes - panel * row_bytes;
    return smem_of(this_rank()) + swizzle(address, row_bytes);
  }

  // put(idx, k, value) of `count` rows or columns, K of each; MN_MAJOR: rows of the panel are k.
  template <typename T, bool MN_MAJOR, int K, typename Put>
  void read(int first, int count, Put put) const {
    constexpr int IN_CHUNK = 16 / sizeof(T);
    const int num_rows = MN_MAJOR ? K : count, num_columns = MN_MAJOR ? count : K;
    for (int row = 0; row < num_rows; ++row) {
      for (int column = 0; column < num_columns; column += IN_CHUNK) {
        const unsigned char* const values =
            chunk(row + (MN_MAJOR ? 0 : first), (column + (MN_MAJOR ? first : 0)) * sizeof(T));
        for (int i = 0; i < IN_CHUNK; ++i) {
          const float value = value_at<T>(values + i * sizeof(T));
          MN_MAJOR ? put(column + i, row, value) : put(row, column + i, value);
        }
      }
    }
  }
};

// What is left of a sum: of fp8 14 bits, the rest cut off.
template <typename T>
SumOf<T> kept_of(SumOf<T> sum) {
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof(bits));
    bits &= ~0x3ffu;
    std::memcpy(&sum, &bits, sizeof(bits));
  }
  return sum;
}

constexpr int kMostColumns = 256;

// Rows of A, and all of B, K of each. A sum takes its terms one by one, from k = 0 on.
template <typename T, bool B_MN_MAJOR, int K>
void multiply(const Product* const (&lanes)[32], const float (&a)[16][K]) {
  constexpr int ROWS = 4, COLUMNS = 8;  // at a time, in registers
  using Sum = SumOf<T>;
  float b[K][kMostColumns];
  OperandInSmem(lanes[0]->b).template read<T, B_MN_MAJOR, K>(0, lanes[0]->num_columns, [&](int n, int k, float value) {
    b[k][n] = value;
  });
  for (int first_row = 0; first_row < 16; first_row += ROWS) {
    for (int n = 0; n < lanes[0]->num_columns; n += COLUMNS) {
      const auto acc = [&](int row, int column) -> Sum& {
        const Product& its = *lanes[(first_row + row) % 8 * 4 + column / 2];
        return static_cast<Sum*>(its.acc)[n / 8 * 4 + first_row / 8 * 2 + column % 2];
      };
      Sum sums[ROWS][COLUMNS] = {};
      for (int row = 0; row < ROWS && lanes[0]->accumulates; ++row) {
        for (int column = 0; column < COLUMNS; ++column) sums[row][column] = acc(row, column);
      }
      for (int k = 0; k < K; ++k) {
        for (int row = 0; row < ROWS; ++row) {
          for (int column = 0; column < COLUMNS; ++column) {
            sums[row][column] += static_cast<Sum>(a[first_row + row][k] * b[k][n + column]);
          }
        }
      }
      for (int row = 0; row < ROWS; ++row) {
        for (int column = 0; column < COLUMNS; ++column) acc(row, column) = kept_of<T>(sums[row][column]);
      }
    }
  }
}

}  // namespace

template <typename T, bool A_MN_MAJOR, bool B_MN_MAJOR>
void compute_product(const Product* const (&lanes)[32], int first_row) {
  constexpr int K = 32 / sizeof(T);
  float a[16][K];
  if (lanes[0]->a_in_registers == nullptr) {
    OperandInSmem(lanes[0]->a).template read<T, A_MN_MAJOR, K>(first_row, 16, [&](int row, int k, float value) {
      a[row][k] = value;
    });
  } else {  // four bytes of a row in each register, of rows + 8, of bytes + 16, of both
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < K; ++k) {
        const int byte = k * static_cast<int>(sizeof(T));
        const uint32_t* const fragment = lanes[row % 8 * 4 + byte % 16 / 4]->a_in_registers;
        a[row][k] = value_at<T>(reinterpret_cast<const char*>(fragment + row / 8 + byte / 16 * 2) + byte % 4);
      }
    }
  }
  multiply<T, B_MN_MAJOR>(lanes, a);
}

template void compute_product<__half, false, false>(const Product* const (&)[32], int);
template void compute_product<__half, false, true>(const Product* const (&)[32], int);
template void compute_product<__half, true, true>(const Product* const (&)[32], int);
template void compute_product<__nv_bfloat16, false, false>(const Product* const (&)[32], int);
template void compute_product<__nv_bfloat16, false, true>(const Product* const (&)[32], int);
template void compute_product<__nv_bfloat16, true, true>(const Product* const (&)[32], int);
template void compute_product<__nv_fp8_e4m3, false, false>(const Product* const (&)[32], int);
template void compute_product<int8_t, false, false>(const Product* const (&)[32], int);

// The metadata's places as PTX has them ("Sparse wgmma.mma_async.sp", its figures of who has which chunks of four).
template <typename T>
void compute_sparse_product(const Product* const (&lanes)[32], int first_row) {
  constexpr int K = 64 / sizeof(T);
  float a[16][K] = {}, stored[16][K / 2];
  OperandInSmem(lanes[0]->a).template read<T, false, K / 2>(first_row, 16, [&](int row, int k, float value) {
    stored[row][k] = value;
  });
  for (int row = 0; row < 16; ++row) {
    for (int chunk = 0; chunk < K / 4; ++chunk) {
      int thread, bit;                 // of the four with rows `row % 8` and + 8
      if constexpr (sizeof(T) == 2) {  // two threads have 16 columns each, of both rows
        thread = 2 * lanes[0]->selector + chunk / 4;
        bit = row / 8 * 16 + chunk % 4 * 4;
      } else {  // each of four has 32 columns of a row
        thread = chunk / 8 * 2 + row / 8;
        bit = chunk % 8 * 4;
      }
      const uint32_t places = *lanes[row % 8 * 4 + thread]->metadata >> bit & 15;
      const uint32_t first = places & 3, second = places >> 2;
      if (first >= second) fail("metadata " + std::to_string(places) + " of a sparse product, which is none");
      a[row][chunk * 4 + first] = stored[row][chunk * 2];
      a[row][chunk * 4 + second] = stored[row][chunk * 2 + 1];
    }
  }
  multiply<T, false>(lanes, a);
}

template void compute_sparse_product<__half>(const Product* const (&)[32], int);
template void compute_sparse_product<__nv_bfloat16>(const Product* const (&)[32], int);
template void compute_sparse_product<__nv_fp8_e4m3>(const Product* const (&)[32], int);
template void compute_sparse_product<int8_t>(const Product* const (&)[32], int);

namespace {

WorkInGroups<Product> products("products");
using ProductQueue = WorkInGroups<Product>::Queue;

// The oldest group.
void compute_group(ProductQueue* const* const* queues, int first_row) {
  const size_t num_products = (*queues[0])->groups.front().size();
  for (size_t i = 0; i < num_products; ++i) {
    const Product* lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      const std::vector<Product>& group = (*queues[lane])->groups.front();
      lanes[lane] = &group[i];
      const Product &mine = group[i], &first = *lanes[0];
      if (group.size() != num_products || mine.a != first.a || mine.b != first.b || mine.compute != first.compute ||
          mine.num_columns != first.num_columns || mine.accumulates != first.accumulates ||
          mine.selector != first.selector) {
        fail("lanes of a warp have issued different products");
      }
    }
    lanes[0]->compute(lanes, first_row);
  }
  for (int lane = 0; lane < 32; ++lane) (*queues[lane])->groups.pop_front();
}

}  // namespace

void add_product(const Product& product) { products.add(product); }
void commit_products() { products.commit(); }

void wait_for_products(size_t num_pending) {
  const int warp = cta.thread_idx % cta.num_threads / 32;
  if (this_lane() == 0) ++num_product_waits[this_rank()][warp];
  ProductQueue* const own = &products.of_this_thread();
  meet(own, [&](ProductQueue* const* const* queues) {
    while ((*queues[0])->groups.size() > num_pending) compute_group(queues, warp % 4 * 16);
  });
}

}  // namespace emulator
