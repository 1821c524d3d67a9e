// GEMM on mma.sync with a multistage cp.async pipeline, and a plain fallback.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     fp32 accumulation, rounded once
//   x (M, K)   weight (N, K)   bias (N)   out (M, N)       bf16 or fp16
//
// Both operands have K contiguous, which is what the fragments of mma.m16n8k16 (row x col) want:
// ldmatrix without transposition for both.
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
//   step k     wait stage k │ barrier │ issue loads of step k + stages - 1 │ ldmatrix, mma on stage k
//
// The barrier also says that all warps are done with step k - 1, whose stage is the one refilled.
// Every thread loads and computes. Rows past M or N and columns past K are zeros in shared memory.
//
// Tiles are walked in groups of GROUP_M tile rows, column by column, so that the CTAs that run
// together share weight tiles and x tiles in L2.
//
// Split K: split s of S takes the s-th run of steps and writes fp32 to the workspace (S, M, N);
// gemm_sm80_reduce adds the splits in order and then the bias. Bitwise repeatable.
//
// Limits: 16-byte aligned rows and K a multiple of 8; anything else takes gemm_fallback_kernel, which is
// plain fp32 arithmetic and slow. M, N < 2^31. Replaced on Hopper by gemm_bf16_sm90 (wgmma, TMA).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "arch/cp_async.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/swizzle.cuh"
#include "gemm/gemm_sm80.h"

namespace fastattn {
namespace {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}

template <typename T>
__device__ __forceinline__ T round_to(float value) {
  return static_cast<T>(value);
}

template <typename T, int TILE_IDX>
struct GemmSm80Storage {
  static constexpr GemmSm80Tile kTile = kGemmSm80Tiles[TILE_IDX];
  static constexpr int kNumThreads = kTile.num_threads();

  alignas(128) T x[kTile.num_stages][kTile.block_m * kTile.block_k];
  alignas(128) T weight[kTile.num_stages][kTile.block_n * kTile.block_k];
};

template <typename T, int TILE_IDX>
__global__ void __launch_bounds__(GemmSm80Storage<T, TILE_IDX>::kNumThreads)
    gemm_sm80_kernel(const __grid_constant__ GemmSm80Params p) {
  using Storage = GemmSm80Storage<T, TILE_IDX>;
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
  constexpr int CHUNKS = BLOCK_K / 8;   // 16-byte pieces of a tile's row
  constexpr int ROWS_PER_PASS = NUM_THREADS / CHUNKS;
  constexpr int GROUP_M = 8;
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp's tile is made of 16 x 16 pieces");
  static_assert(NUM_THREADS % CHUNKS == 0, "a pass of the threads loads whole rows");

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

  const int64_t all_steps = (p.k + BLOCK_K - 1) / BLOCK_K;
  const int64_t steps_per_split = (all_steps + p.config.num_splits - 1) / p.config.num_splits;
  const int64_t first_step = split_idx * steps_per_split;
  const int32_t num_steps = static_cast<int32_t>(max(min(all_steps - first_step, steps_per_split), int64_t{0}));

  // ---- loads: a thread brings one chunk of every ROWS_PER_PASS-th row of both tiles
  const int chunk = threadIdx.x % CHUNKS;
  const int pass_row = threadIdx.x / CHUNKS;
  const T* const x = static_cast<const T*>(p.x);
  const T* const weight = static_cast<const T*>(p.weight);

  const auto load_rows = [&](const T* matrix, int64_t stride, int64_t first_row, int64_t end_row, int64_t column,
                             T* tile, auto num_tile_rows) {
    constexpr int TILE_ROWS = decltype(num_tile_rows)::value;
#pragma unroll
    for (int i = 0; i < (TILE_ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS; ++i) {
      const int tile_row = pass_row + i * ROWS_PER_PASS;
      if (TILE_ROWS % ROWS_PER_PASS != 0 && tile_row >= TILE_ROWS) break;
      const int64_t row = first_row + tile_row;
      const bool valid = row < end_row && column < p.k;
      cp_async_16(tile + swizzled<BLOCK_K>(tile_row, chunk), valid ? matrix + row * stride + column : matrix, valid);
    }
  };
  const auto load_step = [&](int32_t step) {
    const int stage = step % STAGES;
    const int64_t column = (first_step + step) * BLOCK_K + chunk * 8;
    load_rows(x, p.x_stride, first_m, p.m, column, smem.x[stage], std::integral_constant<int, BLOCK_M>());
    load_rows(weight, p.weight_stride, first_n, p.n, column, smem.weight[stage],
              std::integral_constant<int, BLOCK_N>());
  };

#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < num_steps) load_step(step);
    cp_async_commit();
  }

  // ---- main loop
  float acc[M_FRAGS][N_FRAGS][4] = {};
  const int x_row = warp_m * WARP_M + lane % 16;
  const int x_half = lane >> 4;
  const int weight_row = warp_n * WARP_N + (lane & 7) + (lane >> 4) * 8;
  const int weight_half = (lane >> 3) & 1;

  for (int32_t step = 0; step < num_steps; ++step) {
    // STAGES - 1 + step groups are committed; those of step + 1 and later may still be in flight.
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < num_steps) load_step(step + STAGES - 1);
    cp_async_commit();

    const T* const x_tile = smem.x[step % STAGES];
    const T* const weight_tile = smem.weight[step % STAGES];
#pragma unroll
    for (int kk = 0; kk < BLOCK_K / 16; ++kk) {
      uint32_t x_frag[M_FRAGS][4];
#pragma unroll
      for (int mm = 0; mm < M_FRAGS; ++mm) {
        ldmatrix_x4(x_frag[mm], x_tile + swizzled<BLOCK_K>(x_row + mm * 16, kk * 2 + x_half));
      }
#pragma unroll
      for (int nn = 0; nn < N_FRAGS / 2; ++nn) {
        uint32_t weight_frag[4];
        ldmatrix_x4(weight_frag, weight_tile + swizzled<BLOCK_K>(weight_row + nn * 16, kk * 2 + weight_half));
#pragma unroll
        for (int mm = 0; mm < M_FRAGS; ++mm) {
          mma_m16n8k16<T>(acc[mm][2 * nn], x_frag[mm], weight_frag[0], weight_frag[1]);
          mma_m16n8k16<T>(acc[mm][2 * nn + 1], x_frag[mm], weight_frag[2], weight_frag[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // ---- epilogue: straight from the fragments, two columns at a time where N is even
  const T* const bias = static_cast<const T*>(p.bias);
  const bool split = p.config.num_splits > 1;
  const bool paired = p.n % 2 == 0;
#pragma unroll
  for (int nn = 0; nn < N_FRAGS; ++nn) {
    const int64_t column = first_n + warp_n * WARP_N + nn * 8 + 2 * (lane % 4);
    const bool has_bias = bias != nullptr && !split;
    const float bias_0 = has_bias && column < p.n ? to_float(bias[column]) : 0.0f;
    const float bias_1 = has_bias && column + 1 < p.n ? to_float(bias[column + 1]) : 0.0f;
#pragma unroll
    for (int mm = 0; mm < M_FRAGS; ++mm) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = first_m + warp_m * WARP_M + mm * 16 + lane / 4 + i * 8;
        if (row >= p.m || column >= p.n) continue;
        const float value_0 = acc[mm][nn][2 * i] + bias_0;
        const float value_1 = acc[mm][nn][2 * i + 1] + bias_1;
        if (split) {
          float* const target = p.workspace + (split_idx * p.m + row) * p.n + column;
          if (paired) {
            *reinterpret_cast<float2*>(target) = make_float2(value_0, value_1);
          } else {
            target[0] = value_0;
            if (column + 1 < p.n) target[1] = value_1;
          }
        } else {
          T* const target = static_cast<T*>(p.out) + row * p.n + column;
          if (paired) {
            *reinterpret_cast<uint32_t*>(target) = pack_pair<T>(value_0, value_1);
          } else {
            target[0] = round_to<T>(value_0);
            if (column + 1 < p.n) target[1] = round_to<T>(value_1);
          }
        }
      }
    }
  }
}

// out = sum over splits, in order, + bias; one thread per element.
template <typename T>
__global__ void __launch_bounds__(256) gemm_sm80_reduce_kernel(const float* __restrict__ workspace,  // (splits, M, N)
                                                               const T* __restrict__ bias,           // (N) or nullptr
                                                               T* __restrict__ out,                  // (M, N)
                                                               int64_t m, int64_t n, int32_t num_splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= m * n) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int32_t s = 0; s < num_splits; ++s) sum += workspace[s * m * n + i];
  if (bias != nullptr) sum += to_float(bias[i % n]);
  out[i] = round_to<T>(sum);
}

// Any K and any alignment: 32 x 32 outputs per CTA, 2 x 2 per thread, operands as fp32 in shared memory.
template <typename T>
__global__ void __launch_bounds__(256) gemm_fallback_kernel(const __grid_constant__ GemmSm80Params p) {
  constexpr int BLOCK = 32;
  __shared__ float x_tile[BLOCK][BLOCK + 1];  // [k][row]
  __shared__ float weight_tile[BLOCK][BLOCK + 1];
  const T* const x = static_cast<const T*>(p.x);
  const T* const weight = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  const int64_t n_tiles = (p.n + BLOCK - 1) / BLOCK;
  const int64_t first_m = blockIdx.x / n_tiles * BLOCK;
  const int64_t first_n = blockIdx.x % n_tiles * BLOCK;
  const int thread_n = threadIdx.x % 16;
  const int thread_m = threadIdx.x / 16;

  float acc[2][2] = {};
  for (int64_t first_k = 0; first_k < p.k; first_k += BLOCK) {
    const int load_k = threadIdx.x % BLOCK;
    for (int row = threadIdx.x / BLOCK; row < BLOCK; row += 256 / BLOCK) {
      const bool k_valid = first_k + load_k < p.k;
      const bool x_valid = k_valid && first_m + row < p.m;
      const bool weight_valid = k_valid && first_n + row < p.n;
      x_tile[load_k][row] = x_valid ? to_float(x[(first_m + row) * p.x_stride + first_k + load_k]) : 0.0f;
      weight_tile[load_k][row] =
          weight_valid ? to_float(weight[(first_n + row) * p.weight_stride + first_k + load_k]) : 0.0f;
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
      const float value = acc[i][j] + (bias != nullptr ? to_float(bias[column]) : 0.0f);
      static_cast<T*>(p.out)[row * p.n + column] = round_to<T>(value);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename T, int TILE_IDX>
cudaError_t launch_tile(const GemmSm80Params& p, cudaStream_t stream) {
  constexpr int kSmemBytes = sizeof(GemmSm80Storage<T, TILE_IDX>);
  static_assert(kSmemBytes <= 99 * 1024, "the limit of sm_86 and sm_89");
  const auto kernel = gemm_sm80_kernel<T, TILE_IDX>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (error != cudaSuccess) return error;
  const int64_t num_ctas = p.config.m_tiles * p.config.n_tiles * p.config.num_splits;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(num_ctas), kGemmSm80Tiles[TILE_IDX].num_threads(), kSmemBytes, stream>>>(p);
  error = cudaGetLastError();
  if (error != cudaSuccess || p.config.num_splits == 1) return error;

  const int64_t reduce_ctas = (p.m * p.n + 255) / 256;
  gemm_sm80_reduce_kernel<T><<<static_cast<unsigned>(reduce_ctas), 256, 0, stream>>>(
      p.workspace, static_cast<const T*>(p.bias), static_cast<T*>(p.out), p.m, p.n, p.config.num_splits);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_fallback(const GemmSm80Params& p, cudaStream_t stream) {
  const int64_t num_ctas = ((p.m + 31) / 32) * ((p.n + 31) / 32);
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  gemm_fallback_kernel<T><<<static_cast<unsigned>(num_ctas), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

using Launch = cudaError_t (*)(const GemmSm80Params&, cudaStream_t);

struct Instantiation {
  DType dtype;
  Launch tiles[kNumGemmSm80Tiles];
  Launch fallback;
};

constexpr Instantiation kInstantiations[] = {
    {DType::kBFloat16,
     {launch_tile<__nv_bfloat16, 0>, launch_tile<__nv_bfloat16, 1>, launch_tile<__nv_bfloat16, 2>},
     launch_fallback<__nv_bfloat16>},
    {DType::kFloat16,
     {launch_tile<__half, 0>, launch_tile<__half, 1>, launch_tile<__half, 2>},
     launch_fallback<__half>},
};

}  // namespace

cudaError_t gemm_sm80(const GemmSm80Params& params, cudaStream_t stream) {
  for (const Instantiation& entry : kInstantiations) {
    if (entry.dtype != params.dtype) continue;
    if (params.config.fallback) return entry.fallback(params, stream);
    return entry.tiles[params.config.tile_idx](params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
