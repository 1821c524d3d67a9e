// The mainloop of the sm_80 GEMMs: mma.sync with a multistage cp.async pipeline, and a plain fallback.
//
//   out[m, n] = epilogue(sum_k x[m, k] * weight[n, k])     summed in fp32 or int32, rounded once
//   x (M, K)   weight (N, K)   out (M, N)
//
// What the operands are made of, and what the epilogue does, is the template argument (gemm_operands_sm80.cuh); here
// are the tiles, the pipeline and the walk over them. block_k counts units of 16 bits of x: one bf16 or fp16, two int8.
//
// Both operands have K contiguous, which is what the fragments of mma (row x col) want: ldmatrix without
// transposition for x, and for weight unless it has 4 bits.
//
//                     weight tile (block_n x block_k)
//                  ┌─────────┬─────────┬─────────┬─────────┐      stages of a ring in shared memory:
//   x tile         │         │         │         │         │      ┌────────┬────────┬────────┬────────┐
//   (block_m x   ┌─┼─────────┼─────────┼─────────┼─────────┤      │ k      │ k+1    │ k+2    │ k+3    │
//    block_k)    │ │ warp 0  │ warp 2  │ warp 4  │ warp 6  │      │ compute│ in flight       │ refill │
//                │ ├─────────┼─────────┼─────────┼─────────┤      └────────┴────────┴────────┴────────┘
//                │ │ warp 1  │ warp 3  │ warp 5  │ warp 7  │
//                └─┴─────────┴─────────┴─────────┴─────────┘      (drawn for 128 x 128, 2 x 4 warps)
//
//   step k     load scales of step k + 1 │ wait stage k │ barrier │ issue loads of step k + stages - 1 │ fragments, mma
//
// The barrier also says that all warps are done with step k - 1, whose stage is the one refilled.
// Every thread loads and computes. Rows past M or N and columns past K are zeros in shared memory.
//
// Tiles are walked in groups of GROUP_M tile rows, column by column, so that the CTAs that run
// together share weight tiles and x tiles in L2.
//
// Split K: split s of S takes the s-th run of steps and writes its sums to the workspace (S, M, N);
// gemm_sm80_reduce_kernel adds the splits in order and then applies the epilogue. Bitwise repeatable.
//
// Limits: 16-byte aligned rows of x and weight, K a multiple of what 16 bytes of a row hold; anything else takes
// gemm_fallback_kernel, which is plain arithmetic and slow. M, N < 2^31. Replaced on Hopper by kernels on wgmma and
// TMA.
#pragma once

#include <type_traits>

#include "arch/cp_async.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/swizzle.cuh"
#include "arch/vec.cuh"
#include "gemm/gemm_operands_sm80.cuh"
#include "gemm/gemm_sm80.h"

namespace fastattn {

// Columns of K in one 16-byte chunk of a row.
template <typename Operands>
constexpr int kXPerChunk = 16 / sizeof(typename Operands::X);
template <typename Operands>
constexpr int kWeightPerChunk = 128 / Operands::kWeightBits;

template <typename Operands, int TILE_IDX>
struct GemmSm80Storage {
  static constexpr GemmSm80Tile kTile = kGemmSm80Tiles[TILE_IDX];
  static constexpr int kNumThreads = kTile.num_threads();
  // Both tiles are counted in 16-bit units of memory.
  static constexpr int kXUnits = kTile.block_k;
  static constexpr int kWeightUnits = kTile.block_k * kXPerChunk<Operands> / kWeightPerChunk<Operands>;

  alignas(128) uint16_t x[kTile.num_stages][kTile.block_m * kXUnits];
  alignas(128) uint16_t weight[kTile.num_stages][kTile.block_n * kWeightUnits];
};

template <typename Operands, int TILE_IDX>
__global__ void __launch_bounds__(GemmSm80Storage<Operands, TILE_IDX>::kNumThreads)
    gemm_sm80_kernel(const __grid_constant__ GemmSm80Params p) {
  using Storage = GemmSm80Storage<Operands, TILE_IDX>;
  using Out = typename Operands::Out;
  using Acc = typename Operands::Acc;
  constexpr GemmSm80Tile kTile = Storage::kTile;
  constexpr int BLOCK_M = kTile.block_m;
  constexpr int BLOCK_N = kTile.block_n;
  constexpr int BLOCK_K = kTile.block_k;
  constexpr int STAGES = kTile.num_stages;
  constexpr int NUM_THREADS = Storage::kNumThreads;
  constexpr int WARP_M = BLOCK_M / kTile.warps_m;
  constexpr int WARP_N = BLOCK_N / kTile.warps_n;
  constexpr int M_FRAGS = WARP_M / 16;  // fragments of 16 rows of x
  constexpr int N_FRAGS = WARP_N / 8;   // fragments of 8 rows of weight, loaded in pairs
  constexpr int K_STEPS = BLOCK_K / 16;
  constexpr int X_CHUNKS = Storage::kXUnits / 8;  // 16-byte pieces of a tile's row
  constexpr int WEIGHT_CHUNKS = Storage::kWeightUnits / 8;
  constexpr int COLUMNS = BLOCK_K / 8 * kXPerChunk<Operands>;  // of K, in a step
  constexpr int GROUP_M = 8;
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp's tile is made of 16 x 16 pieces");
  static_assert(NUM_THREADS % X_CHUNKS == 0 && NUM_THREADS % WEIGHT_CHUNKS == 0,
                "a pass of the threads loads whole rows");

  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Storage& smem = *reinterpret_cast<Storage*>(smem_bytes);

  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 32 % kTile.warps_m;
  const int warp_n = threadIdx.x / 32 / kTile.warps_m;

  // ---- which tile, and which steps of K
  const int32_t m_tiles = static_cast<int32_t>(p.config.m_tiles);
  const int32_t n_tiles = static_cast<int32_t>(p.config.n_tiles);
  const int32_t split_idx = blockIdx.x / (m_tiles * n_tiles);
  const int32_t tile_idx = blockIdx.x % (m_tiles * n_tiles);
  const int32_t group_idx = tile_idx / (GROUP_M * n_tiles);
  const int32_t group_rows = min(GROUP_M, m_tiles - group_idx * GROUP_M);
  const int32_t in_group = tile_idx - group_idx * GROUP_M * n_tiles;
  const int64_t first_m = static_cast<int64_t>(group_idx * GROUP_M + in_group % group_rows) * BLOCK_M;
  const int64_t first_n = static_cast<int64_t>(in_group / group_rows) * BLOCK_N;

  const int32_t all_steps = static_cast<int32_t>((p.k + COLUMNS - 1) / COLUMNS);
  const int32_t steps_per_split = (all_steps + p.config.num_splits - 1) / p.config.num_splits;
  const int32_t first_step = split_idx * steps_per_split;
  const int32_t num_steps = max(min(all_steps - first_step, steps_per_split), 0);

  // ---- loads: a thread brings one chunk of every (NUM_THREADS / chunks)-th row of both tiles
  const int32_t x_row_chunks = static_cast<int32_t>(p.k / kXPerChunk<Operands>);
  const int32_t weight_row_chunks = static_cast<int32_t>(p.k / kWeightPerChunk<Operands>);
  const int64_t x_stride_bytes = p.x_stride * static_cast<int64_t>(sizeof(typename Operands::X));
  const int64_t weight_stride_bytes = p.weight_stride * (Operands::kWeightBits == 16 ? 2 : 1);

  const auto load_rows = [&](const void* matrix, int64_t stride_bytes, int32_t row_chunks, int64_t first_row,
                             int64_t end_row, int32_t step, uint16_t* tile, auto tile_rows, auto tile_chunks) {
    constexpr int TILE_ROWS = decltype(tile_rows)::value;
    constexpr int CHUNKS = decltype(tile_chunks)::value;
    constexpr int ROWS_PER_PASS = NUM_THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS;
    const int32_t row_chunk = step * CHUNKS + chunk;
#pragma unroll
    for (int i = 0; i < (TILE_ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS; ++i) {
      const int tile_row = threadIdx.x / CHUNKS + i * ROWS_PER_PASS;
      if (TILE_ROWS % ROWS_PER_PASS != 0 && tile_row >= TILE_ROWS) break;
      const int64_t row = first_row + tile_row;
      const bool valid = row < end_row && row_chunk < row_chunks;
      const char* const source =
          static_cast<const char*>(matrix) + row * stride_bytes + static_cast<int64_t>(row_chunk) * 16;
      cp_async_16(tile + swizzled<CHUNKS * 8>(tile_row, chunk), valid ? source : matrix, valid);
    }
  };
  const auto load_step = [&](int32_t step) {
    const int stage = step % STAGES;
    load_rows(p.x, x_stride_bytes, x_row_chunks, first_m, p.m, first_step + step, smem.x[stage],
              std::integral_constant<int, BLOCK_M>(), std::integral_constant<int, X_CHUNKS>());
    load_rows(p.weight, weight_stride_bytes, weight_row_chunks, first_n, p.n, first_step + step, smem.weight[stage],
              std::integral_constant<int, BLOCK_N>(), std::integral_constant<int, WEIGHT_CHUNKS>());
  };

#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < num_steps) load_step(step);
    cp_async_commit();
  }

  // ---- main loop
  Acc acc[M_FRAGS][N_FRAGS][4] = {};
  const int x_row = warp_m * WARP_M + lane % 16;
  const int x_half = lane >> 4;
  const int64_t scale_row = first_n + warp_n * WARP_N + lane / 4;
  using Scales = typename Operands::template Scales<N_FRAGS, K_STEPS>;
  Scales next_scales;
  if (num_steps > 0) next_scales.load(p, scale_row, static_cast<int64_t>(first_step) * COLUMNS);

  for (int32_t step = 0; step < num_steps; ++step) {
    const Scales scales = next_scales;
    if (step + 1 < num_steps) next_scales.load(p, scale_row, static_cast<int64_t>(first_step + step + 1) * COLUMNS);
    // STAGES - 1 + step groups are committed; those of step + 1 and later may still be in flight.
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < num_steps) load_step(step + STAGES - 1);
    cp_async_commit();

    const uint16_t* const x_tile = smem.x[step % STAGES];
    const uint16_t* const weight_tile = smem.weight[step % STAGES];
#pragma unroll
    for (int kk = 0; kk < K_STEPS; ++kk) {
      uint32_t x_frag[M_FRAGS][4];
#pragma unroll
      for (int mm = 0; mm < M_FRAGS; ++mm) {
        ldmatrix_x4(x_frag[mm], x_tile + swizzled<BLOCK_K>(x_row + mm * 16, kk * 2 + x_half));
      }
#pragma unroll
      for (int nn = 0; nn < N_FRAGS / 2; ++nn) {
        uint32_t weight_frag[4];
        Operands::template load_weight<Storage::kWeightUnits>(weight_frag, weight_tile, warp_n * WARP_N, nn, kk,
                                                              scales);
#pragma unroll
        for (int mm = 0; mm < M_FRAGS; ++mm) {
          Operands::mma(acc[mm][2 * nn], x_frag[mm], weight_frag[0], weight_frag[1]);
          Operands::mma(acc[mm][2 * nn + 1], x_frag[mm], weight_frag[2], weight_frag[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // ---- epilogue: straight from the fragments, two columns at a time where N is even
  const bool paired = p.n % 2 == 0;
  const auto rows_of = [&](auto use) {
#pragma unroll
    for (int mm = 0; mm < M_FRAGS; ++mm) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = first_m + warp_m * WARP_M + mm * 16 + lane / 4 + i * 8;
        if (row < p.m) use(row, mm, i);
      }
    }
  };
#pragma unroll
  for (int nn = 0; nn < N_FRAGS; ++nn) {
    const int64_t column = first_n + warp_n * WARP_N + nn * 8 + 2 * (lane % 4);
    if (column >= p.n) break;
    if (p.config.num_splits > 1) {
      rows_of([&](int64_t row, int mm, int i) {
        Acc* const target = static_cast<Acc*>(p.workspace) + (split_idx * p.m + row) * p.n + column;
        const Acc(&sums)[4] = acc[mm][nn];
        if (paired) {
          *reinterpret_cast<Pack<Acc, 2>*>(target) = {sums[2 * i], sums[2 * i + 1]};
        } else {
          target[0] = sums[2 * i];
          if (column + 1 < p.n) target[1] = sums[2 * i + 1];
        }
      });
    } else {
      const typename Operands::Column column_0(p, column);
      const typename Operands::Column column_1(p, column + 1);
      rows_of([&](int64_t row, int mm, int i) {
        const typename Operands::Row scale(p, row);
        const float value_0 = column_0.apply(acc[mm][nn][2 * i], scale);
        const float value_1 = column_1.apply(acc[mm][nn][2 * i + 1], scale);
        Out* const target = static_cast<Out*>(p.out) + row * p.n + column;
        if (paired) {
          *reinterpret_cast<uint32_t*>(target) = pack_pair<Out>(value_0, value_1);
        } else {
          target[0] = round_to<Out>(value_0);
          if (column + 1 < p.n) target[1] = round_to<Out>(value_1);
        }
      });
    }
  }
}

// out = epilogue(sum over splits, in order); one thread per element.
template <typename Operands>
__global__ void __launch_bounds__(256) gemm_sm80_reduce_kernel(const __grid_constant__ GemmSm80Params p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= p.m * p.n) return;
  const auto* const sums = static_cast<const typename Operands::Acc*>(p.workspace) + i;  // (splits, M, N)
  typename Operands::Acc sum = 0;
#pragma unroll 4
  for (int32_t s = 0; s < p.config.num_splits; ++s) sum += sums[s * p.m * p.n];
  const int64_t row = i / p.n;
  const typename Operands::Column column(p, i - row * p.n);
  static_cast<typename Operands::Out*>(p.out)[i] =
      round_to<typename Operands::Out>(column.apply(sum, typename Operands::Row(p, row)));
}

// Any K and any alignment: 32 x 32 outputs per CTA, 2 x 2 per thread, operands as fp32 or int32 in shared memory.
template <typename Operands>
__global__ void __launch_bounds__(256) gemm_fallback_kernel(const __grid_constant__ GemmSm80Params p) {
  using Acc = typename Operands::Acc;
  constexpr int BLOCK = 32;
  __shared__ Acc x_tile[BLOCK][BLOCK + 1];  // [k][row]
  __shared__ Acc weight_tile[BLOCK][BLOCK + 1];
  const int64_t n_tiles = (p.n + BLOCK - 1) / BLOCK;
  const int64_t first_m = blockIdx.x / n_tiles * BLOCK;
  const int64_t first_n = blockIdx.x % n_tiles * BLOCK;
  const int thread_n = threadIdx.x % 16;
  const int thread_m = threadIdx.x / 16;

  Acc acc[2][2] = {};
  for (int64_t first_k = 0; first_k < p.k; first_k += BLOCK) {
    const int64_t load_k = threadIdx.x % BLOCK;
    for (int row = threadIdx.x / BLOCK; row < BLOCK; row += 256 / BLOCK) {
      const bool k_valid = first_k + load_k < p.k;
      const bool x_valid = k_valid && first_m + row < p.m;
      const bool weight_valid = k_valid && first_n + row < p.n;
      x_tile[load_k][row] = x_valid ? Operands::x_value(p, first_m + row, first_k + load_k) : Acc{0};
      weight_tile[load_k][row] = weight_valid ? Operands::weight_value(p, first_n + row, first_k + load_k) : Acc{0};
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < BLOCK; ++kk) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          acc[i][j] += x_tile[kk][thread_m + i * 16] * weight_tile[kk][thread_n + j * 16];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = first_m + thread_m + i * 16;
      const int64_t column = first_n + thread_n + j * 16;
      if (row >= p.m || column >= p.n) continue;
      const float value = typename Operands::Column(p, column).apply(acc[i][j], typename Operands::Row(p, row));
      static_cast<typename Operands::Out*>(p.out)[row * p.n + column] = round_to<typename Operands::Out>(value);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Operands, int TILE_IDX>
cudaError_t launch_gemm_tile(const GemmSm80Params& p, cudaStream_t stream) {
  constexpr int kSmemBytes = sizeof(GemmSm80Storage<Operands, TILE_IDX>);
  static_assert(kSmemBytes <= 99 * 1024, "the limit of sm_86 and sm_89");
  const auto kernel = gemm_sm80_kernel<Operands, TILE_IDX>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (error != cudaSuccess) return error;
  const int64_t num_ctas = p.config.m_tiles * p.config.n_tiles * p.config.num_splits;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(num_ctas), kGemmSm80Tiles[TILE_IDX].num_threads(), kSmemBytes, stream>>>(p);
  error = cudaGetLastError();
  if (error != cudaSuccess || p.config.num_splits == 1) return error;

  const int64_t reduce_ctas = (p.m * p.n + 255) / 256;
  gemm_sm80_reduce_kernel<Operands><<<static_cast<unsigned>(reduce_ctas), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

template <typename Operands>
cudaError_t launch_gemm_fallback(const GemmSm80Params& p, cudaStream_t stream) {
  const int64_t num_ctas = ((p.m + 31) / 32) * ((p.n + 31) / 32);
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  gemm_fallback_kernel<Operands><<<static_cast<unsigned>(num_ctas), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

// A row of a .cu's table: everything that exists for one dtype.
struct GemmSm80Instantiation {
  using Launch = cudaError_t (*)(const GemmSm80Params&, cudaStream_t);
  DType dtype;
  Launch tiles[kNumGemmSm80Tiles];
  Launch fallback;
};

template <typename Operands>
constexpr GemmSm80Instantiation gemm_sm80_instantiation(DType dtype) {
  return {dtype,
          {launch_gemm_tile<Operands, 0>, launch_gemm_tile<Operands, 1>, launch_gemm_tile<Operands, 2>},
          launch_gemm_fallback<Operands>};
}

template <int COUNT>
cudaError_t launch_gemm_sm80(const GemmSm80Instantiation (&table)[COUNT], const GemmSm80Params& p,
                             cudaStream_t stream) {
  for (const GemmSm80Instantiation& entry : table) {
    if (entry.dtype != p.dtype) continue;
    return (p.config.fallback ? entry.fallback : entry.tiles[p.config.tile_idx])(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
