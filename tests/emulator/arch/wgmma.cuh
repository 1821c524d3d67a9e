// Hopper's warpgroup matrix product. Nothing is done when it is issued: operands are read, from shared memory and from
// registers, and accumulators written when it is waited for, as late as the hardware may.
#pragma once

#include "arch/mbarrier.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma_descriptor.cuh"

namespace emulator {

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

// One product as a thread has issued it.
struct Product {
  // For the 16 rows of a warp, given what each of its lanes has issued.
  void (*compute)(const Product* const (&lanes)[32], int first_row);
  void* acc;                       // (N / 8, 4) of SumOf
  const uint32_t* a_in_registers;  // (4) or nullptr
  uint64_t a, b;
  bool accumulates;
};

template <typename T>
using SumOf = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

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

inline WorkInGroups<Product> products("products");
using ProductQueue = WorkInGroups<Product>::Queue;

template <typename T, int N, bool A_MN_MAJOR, bool B_MN_MAJOR>
void compute_product(const Product* const (&lanes)[32], int first_row) {
  constexpr int K = 32 / sizeof(T);
  using Sum = SumOf<T>;
  float a[16][K], b[K][N];
  Sum sums[16][N];
  const OperandInSmem b_in_smem(lanes[0]->b);
  for (int k = 0; k < K; ++k) {
    for (int n = 0; n < N; ++n) b[k][n] = b_in_smem.at<T, B_MN_MAJOR>(n, k);
  }
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
  const auto acc = [&](int row, int n) -> Sum& {
    return static_cast<Sum*>(lanes[row % 8 * 4 + n % 8 / 2]->acc)[n / 8 * 4 + row / 8 * 2 + n % 2];
  };
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < N; ++n) sums[row][n] = lanes[0]->accumulates ? acc(row, n) : Sum();
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < N; ++n) sums[row][n] += static_cast<Sum>(a[row][k] * b[k][n]);
    }
    for (int n = 0; n < N; ++n) acc(row, n) = kept_of<T>(sums[row][n]);
  }
}

// The oldest group of a warp, whose 32 lanes must have issued the same.
inline void compute_group(ProductQueue* const* const* queues, int first_row) {
  const size_t num_products = (*queues[0])->groups.front().size();
  for (size_t i = 0; i < num_products; ++i) {
    const Product* lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
      const std::vector<Product>& group = (*queues[lane])->groups.front();
      lanes[lane] = &group[i];
      const Product &mine = group[i], &first = *lanes[0];
      if (group.size() != num_products || mine.a != first.a || mine.b != first.b || mine.compute != first.compute ||
          mine.accumulates != first.accumulates) {
        fail("lanes of a warp have issued different products");
      }
    }
    lanes[0]->compute(lanes, first_row);
  }
  for (int lane = 0; lane < 32; ++lane) (*queues[lane])->groups.pop_front();
}

}  // namespace emulator

namespace fastattn {

inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::products.commit(); }

template <int PENDING>
void wgmma_wait() {
  if (threadIdx.x % 32 == 0) ++emulator::num_product_waits[emulator::this_rank()][threadIdx.x / 32];
  emulator::ProductQueue* const own = &emulator::products.of_this_thread();
  const int first_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  emulator::meet(own, [&](emulator::ProductQueue* const* const* queues) {
    while ((*queues[0])->groups.size() > PENDING) emulator::compute_group(queues, first_row);
  });
}

template <typename Registers>
void pin_registers(Registers&) {}

template <typename T, int N>
struct Wgmma {
  static constexpr bool kFp8 = sizeof(T) == 1;  // which has operands K-major only

  static void ss(emulator::SumOf<T> (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {
    emulator::products.add({emulator::compute_product<T, N, false, false>, d[0], nullptr, a, b, scale_d != 0});
  }
  static void ss_mn(float (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {
    emulator::products.add({emulator::compute_product<T, N, true, true>, d[0], nullptr, a, b, scale_d != 0});
  }
  static void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int scale_d) {
    emulator::products.add({emulator::compute_product<T, N, false, !kFp8>, d[0], a, 0, b, scale_d != 0});
  }
  static void rs_k(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int scale_d) {
    emulator::products.add({emulator::compute_product<T, N, false, false>, d[0], a, 0, b, scale_d != 0});
  }
};

}  // namespace fastattn
