// What the tensor cores compute: compiled once for all kernels, with all optimization.
#include "arch/mma_sm80.cuh"
#include "arch/wgmma.cuh"
#include "arch/wgmma_sparse.cuh"

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

  // Element k of a row or column; MN_MAJOR: rows of the panel are k.
  template <typename T, bool MN_MAJOR>
  float at(uint32_t idx, uint32_t k) const {
    const uint32_t row = MN_MAJOR ? k : idx, column_bytes = (MN_MAJOR ? idx : k) * sizeof(T);
    const uint32_t panel = MN_MAJOR ? column_bytes / row_bytes : 0;
    const uint32_t address =
        base + panel * leading + row / 8 * stride + row % 8 * row_bytes + column_bytes - panel * row_bytes;
    return value_at<T>(smem_of(this_rank()) + swizzle(address, row_bytes));
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

}  // namespace

namespace {

constexpr int kMostColumns = 256;

// Rows of A, and all of B, K of each.
template <typename T, bool B_MN_MAJOR, int K>
void multiply(const Product* const (&lanes)[32], const float (&a)[16][K]) {
  const int N = lanes[0]->num_columns;
  using Sum = SumOf<T>;
  float b[K][kMostColumns];
  Sum sums[kMostColumns];
  const OperandInSmem b_in_smem(lanes[0]->b);
  for (int k = 0; k < K; ++k) {
    for (int n = 0; n < N; ++n) b[k][n] = b_in_smem.at<T, B_MN_MAJOR>(n, k);
  }
  const auto acc = [&](int row, int n) -> Sum& {
    return static_cast<Sum*>(lanes[row % 8 * 4 + n % 8 / 2]->acc)[n / 8 * 4 + row / 8 * 2 + n % 2];
  };
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < N; ++n) sums[n] = lanes[0]->accumulates ? acc(row, n) : Sum();
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < N; ++n) sums[n] += static_cast<Sum>(a[row][k] * b[k][n]);
    }
    for (int n = 0; n < N; ++n) acc(row, n) = kept_of<T>(sums[n]);
  }
}

}  // namespace

template <typename T, bool A_MN_MAJOR, bool B_MN_MAJOR>
void compute_product(const Product* const (&lanes)[32], int first_row) {
  constexpr int K = 32 / sizeof(T);
  float a[16][K];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      if (lanes[0]->a_in_registers == nullptr) {
        a[row][k] = OperandInSmem(lanes[0]->a).at<T, A_MN_MAJOR>(first_row + row, k);
      } else {  // four bytes of a row in each register, of rows + 8, of bytes + 16, of both
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
  float a[16][K] = {};
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
      a[row][chunk * 4 + first] = OperandInSmem(lanes[0]->a).at<T, false>(first_row + row, chunk * 2);
      a[row][chunk * 4 + second] = OperandInSmem(lanes[0]->a).at<T, false>(first_row + row, chunk * 2 + 1);
    }
  }
  multiply<T, false>(lanes, a);
}

template void compute_sparse_product<__half>(const Product* const (&)[32], int);
template void compute_sparse_product<__nv_bfloat16>(const Product* const (&)[32], int);
template void compute_sparse_product<__nv_fp8_e4m3>(const Product* const (&)[32], int);
template void compute_sparse_product<int8_t>(const Product* const (&)[32], int);

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

}  // namespace emulator
