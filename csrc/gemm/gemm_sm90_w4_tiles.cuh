// The Hopper GEMM for a few rows of x and a weight of 4 bits in tiles: memory's rate, with as little work as there can be.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once
//   x (M, K)   weight (N / 16, K / 64) tiles (fastattn/reference/w4_tiles.py)   out (M, N)
//
// A tile is 16 rows and 64 columns, 512 bytes of which each lane takes 16: four A fragments of mma.m16n8k16.
//
//                 columns of CTA 0     CTA 1 of the cluster
//               ┌────────────────────┬─────────────────────┐   A CTA has whole blocks of ROW_TILES tiles, one above
//   block 0     │ warp 0  │  warp 1  │                     │   the other, and of them a run of columns. Its warps
//   block 1     │ warp 1 │   warp 2  │                     │   have equal shares of that, one after the other: a
//   block 2     │ warp 2    │ warp 3 │                     │   warp begins and ends within a block.
//               └────────────────────┴─────────────────────┘
//
//   each warp     stage i+3 of its share by the copy engine ◄─ is free ─ stage i: A fragments, products
//   then          sums to shared memory │ barrier │ each CTA adds up those of all warps that share a block, and of all
//                 CTAs, in their order  │ bias, round, store
//
// A warp brings its own share of the weight, in its own stages, and nobody else waits for it or for what it waits for.
// The first stages are under way before the kernel in front has ended. Of x as many columns as shared memory has place
// for (kPassTiles) are there at a time, for all warps; they pass over all blocks for these, then for the next ones, and
// keep the sums of their shares beside it.
//
// The codes of a word are in the order that is least work (e2m1_pairs below). A lane makes the scales of two rows for a
// quarter of a tile's columns, which the four lanes of a row hand on.
//
// Limits: 16-byte aligned rows of x, K a multiple of 64, N of 16.
#pragma once

#include <iterator>

#include "arch/cluster.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/tma.cuh"
#include "arch/vec.cuh"
#include "gemm/gemm_sm90_w4_tiles.h"
#include "gemm/gemm_sm90_w4_tiles_formats.cuh"

namespace fastattn {

template <typename Format, int BLOCK_M, int ROW_TILES>
struct GemmSm90W4TilesStorage {
  using T = typename Format::T;
  static constexpr int kWarps = kGemmSm90W4TilesWarps;
  static constexpr int kStages = 3, kStageTiles = 4 / ROW_TILES;
  static constexpr int kPassTiles = gemm_sm90_w4_tiles_pass(BLOCK_M);
  static constexpr int kColumns = 16 * ROW_TILES;                          // of out, in a block
  static constexpr int kShares = kWarps + gemm_sm90_w4_tiles_max_blocks(BLOCK_M) - 1;  // of blocks, that warps have

  struct Stage {
    alignas(128) uint4 codes[ROW_TILES][kStageTiles][32];
    alignas(16) unsigned char scales[ROW_TILES][kStageTiles][Format::kTileBytes];
  };
  Stage ring[kWarps][kStages];
  // Rows are 16 bytes apart modulo 128, so that eight of them lie in different banks.
  alignas(128) T x[BLOCK_M][64 * kPassTiles + 8];
  // Rows are 4 sums apart modulo 16, so that the accumulators of a warp go to all banks.
  alignas(16) float sums[kShares][BLOCK_M][kColumns + 4];
  MBarrier full[kWarps][kStages], x_full, x_empty;
};

// What a CTA of a cluster has of the columns, in tiles, and how they are shared out.
struct W4TilesColumns {
  int32_t first, num, pass;  // pass: of each pass, but for the last one, which may have less

  __device__ __forceinline__ W4TilesColumns(int32_t all, int32_t rank, int32_t num_splits, int32_t most_of_pass) {
    first = rank * all / num_splits;
    num = (rank + 1) * all / num_splits - first;
    const int32_t num_passes = (num + most_of_pass - 1) / most_of_pass;
    pass = (num + num_passes - 1) / num_passes;
  }
};

// The tiles of a pass that a warp has, by blocks: `begin` to `end`.
__device__ __forceinline__ int32_t w4_tiles_share(int32_t num_tiles, int32_t warp_idx) {
  return warp_idx * num_tiles / kGemmSm90W4TilesWarps;
}
// And the warp that has one of them.
__device__ __forceinline__ int32_t w4_tiles_owner(int32_t num_tiles, int32_t tile) {
  return ((tile + 1) * kGemmSm90W4TilesWarps - 1) / num_tiles;
}

// A warp's way through its share, up to STAGE tiles of a block at a time.
template <int STAGE>
struct W4TilesWalk {
  int32_t pass = 0, block, column, left;

  struct Share {
    int32_t block, column, num;  // where it begins, tiles
    W4TilesColumns columns;
  };

  __device__ __forceinline__ explicit W4TilesWalk(const Share& share) { begin(share); }

  // Tiles of the pass that the step covers, and how many of them there are.
  __device__ __forceinline__ int32_t covered(const Share& share) const {
    return min(min(STAGE, share.columns.pass - column), left);
  }
  __device__ __forceinline__ int32_t num_tiles(const Share& share) const {
    return min(covered(share), share.columns.num - pass * share.columns.pass - column);
  }
  __device__ __forceinline__ bool is_over(const Share& share) const {
    return share.num == 0 || pass * share.columns.pass >= share.columns.num;
  }
  // To the next step that has tiles, or the end.
  __device__ __forceinline__ void advance(const Share& share) {
    do {
      const int32_t step = covered(share);
      column += step;
      left -= step;
      if (column == share.columns.pass) {
        column = 0;
        ++block;
      }
      if (left == 0) {
        ++pass;
        begin(share);
      }
    } while (!is_over(share) && num_tiles(share) <= 0);
  }

 private:
  __device__ __forceinline__ void begin(const Share& share) {
    block = share.block;
    column = share.column;
    left = share.num;
  }
};

template <typename Format, int BLOCK_M, int ROW_TILES>
__global__ void __launch_bounds__(32 * kGemmSm90W4TilesWarps, 1)
    gemm_sm90_w4_tiles_kernel(const __grid_constant__ GemmSm90W4TilesParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Format::T;
  using Storage = GemmSm90W4TilesStorage<Format, BLOCK_M, ROW_TILES>;
  constexpr int STAGES = Storage::kStages, STAGE_TILES = Storage::kStageTiles;
  using Walk = W4TilesWalk<STAGE_TILES>;

  Storage& smem = shared_storage_of_128<Storage>();
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t rank = static_cast<int32_t>(cluster_rank()), num_splits = p.config.num_splits;
  const int32_t cluster = static_cast<int32_t>(blockIdx.x) / num_splits;
  const int32_t num_clusters = static_cast<int32_t>(p.config.num_ctas) / num_splits;

  const int32_t all_rows = static_cast<int32_t>(p.n / 16), all_columns = static_cast<int32_t>(p.k / 64);  // tiles
  const int32_t all_blocks = (all_rows + ROW_TILES - 1) / ROW_TILES;
  const int32_t first_block = static_cast<int32_t>(int64_t{cluster} * all_blocks / num_clusters);
  const int32_t num_blocks =
      static_cast<int32_t>((int64_t{cluster} + 1) * all_blocks / num_clusters) - first_block;
  const W4TilesColumns columns(all_columns, rank, num_splits, Storage::kPassTiles);
  const int32_t first_share = w4_tiles_share(num_blocks * columns.pass, warp_idx);
  const typename Walk::Share share = {first_share / columns.pass, first_share % columns.pass,
                                      w4_tiles_share(num_blocks * columns.pass, warp_idx + 1) - first_share, columns};

  if (threadIdx.x < Storage::kWarps * STAGES) smem.full[threadIdx.x / STAGES][threadIdx.x % STAGES].init(1);
  if (threadIdx.x == 0) {
    smem.x_full.init(1);
    smem.x_empty.init(Storage::kWarps);
  }
  fence_barrier_init();
  __syncthreads();

  // ---- the weight: by lane 0, of the stage that `ahead` is at
  const uint64_t policy = evict_first_policy();
  Walk ahead(share);
  RingPosition<STAGES> loaded, multiplied;
  const auto load_stage = [&] {
    if (ahead.is_over(share)) return;
    if (lane == 0) {
      const uint32_t num = static_cast<uint32_t>(ahead.num_tiles(share));
      typename Storage::Stage& stage = smem.ring[warp_idx][loaded.stage()];
      MBarrier& full = smem.full[warp_idx][loaded.stage()];
      full.arrive_expect_bytes(ROW_TILES * num * (512 + Format::kTileBytes));
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        // Below the last row stands the last one: its sums go nowhere.
        const int32_t row = min((first_block + ahead.block) * ROW_TILES + i, all_rows - 1);
        const int64_t tile = int64_t{row} * all_columns + columns.first + ahead.pass * columns.pass + ahead.column;
        tma_load_bytes(stage.codes[i], static_cast<const unsigned char*>(p.weight) + tile * 512, full, num * 512,
                       policy);
        tma_load_bytes(stage.scales[i], static_cast<const unsigned char*>(p.weight_scale) + tile * Format::kTileBytes,
                       full, num * Format::kTileBytes, policy);
      }
    }
    loaded.advance();
    ahead.advance(share);
  };
#pragma unroll 1
  for (int i = 0; i < STAGES; ++i) load_stage();

  // ---- what sums are multiplied by and added to, as far as L2; x
  const int32_t out_columns = num_blocks * Storage::kColumns, first_column = first_block * Storage::kColumns;
  if (const int32_t column = first_column + static_cast<int32_t>(threadIdx.x) * 32;
      column < min(first_column + out_columns, static_cast<int32_t>(p.n))) {
    if (p.global_scale != nullptr) prefetch_l2(p.global_scale + column);
    if (p.bias != nullptr) prefetch_l2(static_cast<const T*>(p.bias) + column);
  }
  const auto load_x = [&](int32_t pass) {
    const int32_t num = min(columns.pass, columns.num - pass * columns.pass);
    smem.x_full.arrive_expect_bytes(static_cast<uint32_t>(p.m) * num * 64 * sizeof(T));
    const T* source = static_cast<const T*>(p.x) + int64_t{columns.first + pass * columns.pass} * 64;
    for (int32_t row = 0; row < p.m; ++row, source += p.x_stride) {
      tma_load_bytes(smem.x[row], source, smem.x_full, num * 64 * sizeof(T));
    }
  };
  grid_dependency_wait();
  if (threadIdx.x == 0) load_x(0);
  __syncwarp();

  // ---- products
  const uint32_t x_row = shared_address(smem.x[lane % 8]) + lane / 8 * 16;  // of the matrix that a lane points to
  float acc[ROW_TILES][BLOCK_M / 8][4];
  Walk now(share);
#pragma unroll 1
  for (int32_t pass = 0; pass * columns.pass < columns.num; ++pass) {
    if (pass > 0) {
      __syncwarp();
      if (lane == 0) smem.x_empty.arrive();
      if (threadIdx.x == 0) {
        smem.x_empty.wait((pass - 1) % 2);
        load_x(pass);
      }
      __syncwarp();
    }
    smem.x_full.wait(pass % 2);
    bool is_first = true;  // of a block, in this pass
#pragma unroll 1
    while (!now.is_over(share) && now.pass == pass) {
      const int32_t block = now.block;
      float(&sums)[BLOCK_M][Storage::kColumns + 4] = smem.sums[warp_idx + block];
      const auto each_sum = [&](auto f) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
          for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              f(acc[r][t][i], sums[t * 8 + lane % 4 * 2 + i % 2][r * 16 + lane / 4 + i / 2 * 8]);
            }
          }
        }
      };
      if (is_first) each_sum([&](float& a, const float& sum) { a = pass == 0 ? 0.0f : sum; });

      const int32_t num = now.num_tiles(share);
      const typename Storage::Stage& stage = smem.ring[warp_idx][multiplied.stage()];
      smem.full[warp_idx][multiplied.stage()].wait(multiplied.parity());
      uint32_t x_tile = x_row + now.column * 128;
#pragma unroll 1
      for (int32_t tile = 0; tile < num; ++tile, x_tile += 128) {
        uint32_t b[BLOCK_M / 8][2][4];
#pragma unroll
        for (int t = 0; t < BLOCK_M / 8; ++t) {
          const uint32_t rows = x_tile + t * 8 * sizeof(smem.x[0]);
          ldmatrix_x4(b[t][0], rows);
          ldmatrix_x4(b[t][1], rows + 64);
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          const uint4 codes = stage.codes[r][tile][lane];
          const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
          const Format scales(stage.scales[r][tile], lane);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t a[4];
            scales.make_fragment(a, words[j], j, lane);
#pragma unroll
            for (int t = 0; t < BLOCK_M / 8; ++t) {
              mma_m16n8k16<T>(acc[r][t], a, b[t][j / 2][j % 2 * 2], b[t][j / 2][j % 2 * 2 + 1]);
            }
          }
        }
      }
      __syncwarp();  // all lanes have read the stage
      load_stage();
      multiplied.advance();
      now.advance(share);
      is_first = now.block != block || now.pass != pass;
      if (is_first) each_sum([&](const float& a, float& sum) { sum = a; });
    }
  }
  grid_dependency_launch();
  cluster_sync();

  // ---- epilogue: a thread writes four columns at a time
  constexpr int FOURS = Storage::kColumns / 4;  // of a block
  const int32_t fours = num_blocks * FOURS, num_fours = fours * static_cast<int32_t>(p.m);
#pragma unroll 1
  for (int32_t i = rank * static_cast<int32_t>(blockDim.x) + static_cast<int32_t>(threadIdx.x); i < num_fours;
       i += num_splits * static_cast<int32_t>(blockDim.x)) {
    const int32_t row = i / fours, block = i % fours / FOURS, in_block = i % FOURS * 4;
    const int32_t column = first_column + block * Storage::kColumns + in_block;
    if (column >= p.n) continue;
    float factors[4], bias[4] = {};
    if (p.bias != nullptr) load_vec<4>(static_cast<const T*>(p.bias) + column, bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      factors[j] =
          p.global_scale == nullptr ? Format::kSumFactor : Format::kSumFactor / __ldg(p.global_scale + column + j);
    }
    float4 sum = {};
    for (int32_t split = 0; split < num_splits; ++split) {
      const W4TilesColumns its(all_columns, split, num_splits, Storage::kPassTiles);
      const int32_t num_tiles = num_blocks * its.pass;
      const int32_t last = w4_tiles_owner(num_tiles, (block + 1) * its.pass - 1);
      for (int32_t warp = w4_tiles_owner(num_tiles, block * its.pass); warp <= last; ++warp) {
        if (w4_tiles_share(num_tiles, warp) == w4_tiles_share(num_tiles, warp + 1)) continue;
        const auto value = load_cluster<float4>(cluster_address(&smem.sums[warp + block][row][in_block], split));
        sum.x += value.x;
        sum.y += value.y;
        sum.z += value.z;
        sum.w += value.w;
      }
    }
    const float values[4] = {sum.x * factors[0] + bias[0], sum.y * factors[1] + bias[1], sum.z * factors[2] + bias[2],
                             sum.w * factors[3] + bias[3]};
    store_vec<4>(static_cast<T*>(p.out) + row * p.n + column, values);
  }
  if (num_splits > 1) {
    __syncwarp();
    cluster_meet();  // the others may still read from this CTA
  }
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Format, int BLOCK_M, int ROW_TILES>
cudaError_t launch_gemm_sm90_w4_tiles(const GemmSm90W4TilesParams& p, cudaStream_t stream) {
  using Storage = GemmSm90W4TilesStorage<Format, BLOCK_M, ROW_TILES>;
  static_assert(sizeof(Storage) <= 227 * 1024);
  return launch_clusters(gemm_sm90_w4_tiles_kernel<Format, BLOCK_M, ROW_TILES>, p.config.num_ctas, p.config.num_splits,
                         32 * kGemmSm90W4TilesWarps, sizeof(Storage), stream, p);
}

template <typename Format, int SHAPE_IDX = 0>
cudaError_t run_gemm_sm90_w4_tiles(const GemmSm90W4TilesParams& p, cudaStream_t stream) {
  if constexpr (SHAPE_IDX < std::size(kGemmSm90W4TilesShapes)) {
    constexpr GemmSm90W4TilesShape kShape = kGemmSm90W4TilesShapes[SHAPE_IDX];
    if (p.config.shape.block_m == kShape.block_m && p.config.shape.row_tiles == kShape.row_tiles) {
      return launch_gemm_sm90_w4_tiles<Format, kShape.block_m, kShape.row_tiles>(p, stream);
    }
    return run_gemm_sm90_w4_tiles<Format, SHAPE_IDX + 1>(p, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
