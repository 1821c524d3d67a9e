// A warp's products of tiles in shared memory (arch/swizzle.cuh) on mma.sync.
//
// An operand is walked along k (kk, 16 at a time) and along its rows or columns of the result (16 at a time). It lies
// in shared memory in one of two ways, and ldmatrix makes fragments of both:
//
//                   k along a tile's columns              k along a tile's rows (the transposing load)
//   A (rows × k)    S = Q K^T: Q                          dV = P^T dO: P, stored as (query, key)
//   B (k × columns) S = Q K^T: K, stored as (key, dim)    O = P V: V, stored as (key, dim)
#pragma once

#include <cstdint>

#include "arch/mma_sm80.cuh"
#include "arch/swizzle.cuh"

namespace fastattn {

// One lane's address in a tile of COLS columns, from which those of all fragments follow with one exclusive or: rows
// move by multiples of 8, so that the swizzle key is the lane's, and chunks by numbers that have no bit below 8 in
// common with the lane's own.
template <int COLS>
struct LaneAddress {
  uint32_t address;

  // The tile begins at a multiple of 128 bytes.
  template <typename T>
  __device__ __forceinline__ LaneAddress(const T* tile, int row, int chunk)
      : address(shared_address(tile + swizzled<COLS>(row, chunk))) {}

  __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
    constexpr int kMask = kSwizzleMask<COLS>;
    return (address ^ ((chunks & kMask) << 4)) + rows * COLS * 2 + (chunks & ~kMask) * 16;
  }
};

// An operand of one warp whose k runs along the tile's columns (or its rows), from `first_k` on (a multiple of 64 along
// columns), and that begins at `first` along the other. Where WARPS share a tile's columns they take groups of 16 in
// turn: `first` is then the warp's index * 16.
template <int COLS, bool K_IN_ROWS, bool IS_A, int WARPS>
struct WarpOperand {
  LaneAddress<COLS> lane;

  template <typename T>
  __device__ __forceinline__ WarpOperand(const T* tile, int first, int first_k = 0)
      : lane(tile, row(first, first_k), chunk(first, first_k)) {}

  // Fragments of 16 rows (A) or columns (B) from `offset` on, for the 16 of k from kk * 16 on. For B, f[0], f[1] are
  // the first eight columns and f[2], f[3] the next.
  __device__ __forceinline__ void load(uint32_t (&f)[4], int offset, int kk) const {
    if constexpr (K_IN_ROWS) {
      ldmatrix_x4_trans(f, lane.at(kk * 16, offset / 8 * WARPS));
    } else {
      ldmatrix_x4(f, lane.at(offset, kk * 2));
    }
  }

 private:
  // The four 8 x 8 tiles of a load: the second is the one below in A's fragment and the one along k in B's; a
  // transposing load swaps them.
  static constexpr bool kSecondIsBelow = IS_A != K_IN_ROWS;
  static __device__ __forceinline__ int row(int first, int first_k) {
    const int lane = threadIdx.x % 32;
    return (K_IN_ROWS ? first_k : first) + (kSecondIsBelow ? lane % 16 : (lane & 7) + (lane >> 4) * 8);
  }
  static __device__ __forceinline__ int chunk(int first, int first_k) {
    const int lane = threadIdx.x % 32;
    return (K_IN_ROWS ? first : first_k) / 8 + (kSecondIsBelow ? lane >> 4 : (lane >> 3) & 1);
  }
};

template <int COLS, bool K_IN_ROWS = false>
using WarpOperandA = WarpOperand<COLS, K_IN_ROWS, true, 1>;
template <int COLS, bool K_IN_ROWS = false, int WARPS = 1>
using WarpOperandB = WarpOperand<COLS, K_IN_ROWS, false, WARPS>;

// Where a warp's results go in a tile of T: two neighbouring columns of a lane at a time. WARPS as above.
template <int COLS, int WARPS = 1>
struct WarpResult {
  LaneAddress<COLS> lane;

  template <typename T>
  __device__ __forceinline__ WarpResult(T* tile, int first_row, int first_col)
      : lane(tile, first_row + threadIdx.x % 32 / 4, first_col / 8) {
    lane.address += threadIdx.x % 4 * 4;
  }

  // `rows` (a multiple of 8) and `tile` (of 8 columns) from the warp's first ones.
  __device__ __forceinline__ void store(int rows, int tile, uint32_t pair) const {
    store_shared(lane.at(rows, tile / 2 * 2 * WARPS + tile % 2), pair);
  }

  template <typename T, int TILES_M, int TILES_N>
  __device__ __forceinline__ void store_all(const float (&acc)[TILES_M][TILES_N][4], float scale) const {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
      for (int n = 0; n < TILES_N; ++n) {
        store(m * 16, n, pack_pair<T>(acc[m][n][0] * scale, acc[m][n][1] * scale));
        store(m * 16 + 8, n, pack_pair<T>(acc[m][n][2] * scale, acc[m][n][3] * scale));
      }
    }
  }
};

// acc += a * b over K_STEPS * 16 of k. Fragments are loaded ahead of the products that need them: of A one step of k,
// of B as many groups of 16 columns as AHEAD says.
template <typename T, int K_STEPS, int AHEAD, int TILES_M, int TILES_N, typename A, typename B>
__device__ __forceinline__ void warp_gemm(float (&acc)[TILES_M][TILES_N][4], const A& a, const B& b) {
  static_assert(TILES_N % 2 == 0, "B comes 16 columns at a time");
  constexpr int GROUPS = TILES_N / 2;
  constexpr int SLOTS = AHEAD + 1;
  uint32_t a_frag[2][TILES_M][4];
  uint32_t b_frag[SLOTS][4];
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) a.load(a_frag[0][m], m * 16, 0);
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) b.load(b_frag[i], i % GROUPS * 16, i / GROUPS);
#pragma unroll
  for (int kk = 0; kk < K_STEPS; ++kk) {
    if (kk + 1 < K_STEPS) {
#pragma unroll
      for (int m = 0; m < TILES_M; ++m) a.load(a_frag[(kk + 1) & 1][m], m * 16, kk + 1);
    }
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
      const int now = kk * GROUPS + n, next = now + AHEAD;
      if (next < K_STEPS * GROUPS) b.load(b_frag[next % SLOTS], next % GROUPS * 16, next / GROUPS);
#pragma unroll
      for (int m = 0; m < TILES_M; ++m) {
        mma_m16n8k16<T>(acc[m][2 * n], a_frag[kk & 1][m], b_frag[now % SLOTS][0], b_frag[now % SLOTS][1]);
        mma_m16n8k16<T>(acc[m][2 * n + 1], a_frag[kk & 1][m], b_frag[now % SLOTS][2], b_frag[now % SLOTS][3]);
      }
    }
  }
}

// acc += p * b, where p is accumulators of an earlier product, rounded to T: two neighbouring tiles are one A fragment.
template <typename T, int AHEAD, int TILES_M, int TILES_K, int TILES_N, typename B>
__device__ __forceinline__ void warp_gemm_registers(float (&acc)[TILES_M][TILES_N][4],
                                                    const float (&p)[TILES_M][TILES_K][4], const B& b) {
  static_assert(TILES_N % 2 == 0 && TILES_K % 2 == 0, "operands come 16 at a time");
  constexpr int GROUPS = TILES_N / 2;
  constexpr int SLOTS = AHEAD + 1;
  uint32_t a_frag[TILES_M][4];
  uint32_t b_frag[SLOTS][4];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) b.load(b_frag[i], i % GROUPS * 16, i / GROUPS);
#pragma unroll
  for (int kk = 0; kk < TILES_K / 2; ++kk) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&tile)[4] = p[m][2 * kk + j / 2];
        a_frag[m][j] = pack_pair<T>(tile[2 * (j % 2)], tile[2 * (j % 2) + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < GROUPS; ++n) {
      const int now = kk * GROUPS + n, next = now + AHEAD;
      if (next < TILES_K / 2 * GROUPS) b.load(b_frag[next % SLOTS], next % GROUPS * 16, next / GROUPS);
#pragma unroll
      for (int m = 0; m < TILES_M; ++m) {
        mma_m16n8k16<T>(acc[m][2 * n], a_frag[m], b_frag[now % SLOTS][0], b_frag[now % SLOTS][1]);
        mma_m16n8k16<T>(acc[m][2 * n + 1], a_frag[m], b_frag[now % SLOTS][2], b_frag[now % SLOTS][3]);
      }
    }
  }
}

}  // namespace fastattn
