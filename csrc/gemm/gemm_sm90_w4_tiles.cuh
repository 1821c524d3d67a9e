// The Hopper GEMM for a few rows of x and a weight of 4 bits in tiles: memory's rate, with as little work as there can
// be.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once; times x_scale[m] of x in e4m3
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
//   each warp     stage i+2 of its share by the copy engine ◄─ is free ─ stage i: A fragments, products
//   then          sums to shared memory │ barrier │ each CTA adds up those of all warps that share a block, and of all
//                 CTAs, in their order  │ bias, round, store
//
// A warp brings its own share of the weight, in its own stages, and nobody else waits for it or for what it waits for.
// The first stages are asked for, as far as L2, before the kernel in front has ended. Of x as many columns as shared
// memory has place for (kPassTiles) are there at a time, for all warps; they pass over all blocks for these, then for
// the next ones, and keep the sums of their shares beside it.
//
// The codes of a word are in the order that is least work (small_e2m1_pairs). A lane makes the scales of two rows for a
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

struct GemmSm90W4TilesArgs {
  GemmSm90W4Params p;
  GemmSm90W4TilesConfig config;
};

template <typename Format, typename Shape>
struct GemmSm90W4TilesStorage {
  using T = typename Format::T;
  static constexpr int kStages = Shape::kStages, kStageTiles = Shape::kStageTiles, kRowTiles = Shape::kRowTiles;
  static constexpr int kBlockM = Shape::kBlockM;
  static constexpr int kColumns = 16 * kRowTiles;                        // of out, in a block
  static constexpr int kShares = Shape::kWarps + Shape::kMaxBlocks - 1;  // of blocks, that warps have

  // Of INT4 no scales.
  static constexpr int kScaleBytes = Format::kTileBytes > 0 ? kStageTiles * Format::kTileBytes : 1;
  struct Stage {
    alignas(128) uint4 codes[kRowTiles][kStageTiles][32];
    alignas(16) unsigned char scales[kRowTiles][kScaleBytes];
  };
  Stage ring[Shape::kWarps][kStages];
  // Rows are 16 bytes apart modulo 128, so that eight of them lie in different banks; 32 where a lane takes 8 bytes.
  alignas(128) T x[kBlockM][64 * Shape::kPassTiles + (Format::kFours ? 16 : 8)];
  // Rows are 4 sums apart modulo 16, so that the accumulators of a warp go to all banks.
  alignas(16) float sums[kShares][kBlockM][kColumns + 4];
  MBarrier full[Shape::kWarps][kStages], x_full, x_empty;
};

// What a CTA of a cluster has of the columns, in tiles. It goes over all of its blocks for `pass` of them, then for the
// next ones, the last time perhaps for fewer.
struct W4TilesColumns {
  int32_t first, num, pass;

  __device__ __forceinline__ W4TilesColumns(int32_t all, int32_t rank, int32_t num_splits, int32_t most_of_pass) {
    first = rank * all / num_splits;
    num = (rank + 1) * all / num_splits - first;
    const int32_t num_passes = (num + most_of_pass - 1) / most_of_pass;
    pass = (num + num_passes - 1) / num_passes;
  }
};

// The first of a pass's tiles, by blocks, that a warp has.
template <int WARPS>
__device__ __forceinline__ int32_t w4_tiles_share(int32_t num_tiles, int32_t warp_idx) {
  return warp_idx * num_tiles / WARPS;
}
// The warps that have tiles of a block, from the first to the last; one between them has none where there are more
// warps than tiles.
template <int WARPS>
struct W4TilesOwners {
  int32_t num_tiles, first, last;

  __device__ __forceinline__ W4TilesOwners(int32_t num_blocks, int32_t block, int32_t columns) {
    num_tiles = num_blocks * columns;
    first = ((block * columns + 1) * WARPS - 1) / num_tiles;
    last = ((block + 1) * columns * WARPS - 1) / num_tiles;
  }
  __device__ __forceinline__ bool has_none(int32_t warp_idx) const {
    return w4_tiles_share<WARPS>(num_tiles, warp_idx) == w4_tiles_share<WARPS>(num_tiles, warp_idx + 1);
  }
};

// A warp's share of each pass: where it begins, and how many tiles it is.
struct W4TilesShare {
  int32_t block, column, num;
  W4TilesColumns columns;
};

// A warp's way through it, up to STAGE tiles of a block at a time.
template <int STAGE>
struct W4TilesWalk {
  int32_t first = 0;  // column of the pass
  int32_t block, column, left;
  int32_t covered, num;  // tiles of the step: as if the pass were a whole one, and those that there are

  __device__ __forceinline__ explicit W4TilesWalk(const W4TilesShare& share) {
    begin(share);
    if (share.num == 0) first = share.columns.num;
    measure(share);
  }
  __device__ __forceinline__ bool is_over(const W4TilesShare& share) const { return first >= share.columns.num; }
  // To the next step that has tiles, or the end.
  __device__ __forceinline__ void advance(const W4TilesShare& share) {
    do {
      column += covered;
      left -= covered;
      if (column == share.columns.pass) {
        column = 0;
        ++block;
      }
      if (left == 0) {
        first += share.columns.pass;
        begin(share);
      }
      measure(share);
    } while (num <= 0 && !is_over(share));
  }

 private:
  __device__ __forceinline__ void begin(const W4TilesShare& share) {
    block = share.block;
    column = share.column;
    left = share.num;
  }
  __device__ __forceinline__ void measure(const W4TilesShare& share) {
    covered = min(min(STAGE, share.columns.pass - column), left);
    num = min(covered, share.columns.num - first - column);
  }
};

template <typename Format, typename Shape>
__global__ void __launch_bounds__(32 * Shape::kWarps, 1)
    gemm_sm90_w4_tiles_kernel(const __grid_constant__ GemmSm90W4TilesArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Format::T;
  using Out = typename Format::Out;
  using Storage = GemmSm90W4TilesStorage<Format, Shape>;
  using Walk = W4TilesWalk<Shape::kStageTiles>;
  constexpr int BLOCK_M = Shape::kBlockM, ROW_TILES = Shape::kRowTiles, WARPS = Shape::kWarps;
  constexpr int STAGES = Shape::kStages;
  constexpr bool kWidened = sizeof(typename Format::X) == 1;  // x becomes T on its way to shared memory

  Storage& smem = shared_storage_of_128<Storage>();
  const GemmSm90W4Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t rank = static_cast<int32_t>(cluster_rank()), num_splits = args.config.num_splits;
  const int32_t cluster = static_cast<int32_t>(blockIdx.x) / num_splits;
  const int32_t num_clusters = static_cast<int32_t>(args.config.num_ctas) / num_splits;

  const int32_t all_rows = static_cast<int32_t>(p.n / 16), all_columns = static_cast<int32_t>(p.k / 64);  // tiles
  const int32_t all_blocks = (all_rows + ROW_TILES - 1) / ROW_TILES;
  const int32_t first_block = cluster * all_blocks / num_clusters;
  const int32_t num_blocks = (cluster + 1) * all_blocks / num_clusters - first_block;
  const W4TilesColumns columns(all_columns, rank, num_splits, Shape::kPassTiles);
  const int32_t first_share = w4_tiles_share<WARPS>(num_blocks * columns.pass, warp_idx);
  const W4TilesShare share = {first_share / columns.pass, first_share % columns.pass,
                              w4_tiles_share<WARPS>(num_blocks * columns.pass, warp_idx + 1) - first_share, columns};

  if (threadIdx.x < WARPS * STAGES) smem.full[threadIdx.x / STAGES][threadIdx.x % STAGES].init(1);
  if (threadIdx.x == 0) {
    smem.x_full.init(kWidened ? WARPS : 1);
    smem.x_empty.init(WARPS);
  }
  fence_barrier_init();
  __syncthreads();

  // ---- the weight: what a walk is at, to a stage, or as far as L2. By lane 0, of each tile of the block.
  const uint64_t policy = evict_first_policy();
  const auto each_tile = [&](const Walk& walk, auto load) {
    const int32_t row = (first_block + walk.block) * ROW_TILES, column = columns.first + walk.first + walk.column;
    const uint32_t num = static_cast<uint32_t>(walk.num);
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      // Below the last row stands the last one: its sums go nowhere.
      const uint32_t tile = min(row + i, all_rows - 1) * all_columns + column;
      load(i, static_cast<const uint4*>(p.weight) + uint64_t{tile} * 32, num * 512,
           static_cast<const unsigned char*>(p.weight_scale) + uint64_t{tile} * Format::kTileBytes,
           num * Format::kTileBytes);
    }
  };
  Walk ahead(share);
  const auto load_stage = [&](int idx) {
    if (ahead.is_over(share)) return;
    if (lane == 0) {
      typename Storage::Stage& stage = smem.ring[warp_idx][idx];
      MBarrier& full = smem.full[warp_idx][idx];
      full.arrive_expect_bytes(ROW_TILES * static_cast<uint32_t>(ahead.num) * (512 + Format::kTileBytes));
      each_tile(ahead,
                [&](int i, const uint4* codes, uint32_t num_codes, const unsigned char* scales, uint32_t num_scales) {
                  tma_load_bytes(stage.codes[i], codes, full, num_codes, policy);
                  if constexpr (Format::kTileBytes > 0)
                    tma_load_bytes(stage.scales[i], scales, full, num_scales, policy);
                });
    }
    ahead.advance(share);
  };
  Walk asked(share);
#pragma unroll 1
  for (int i = 0; i < STAGES && !asked.is_over(share); ++i) {
    if (lane == 0) {
      each_tile(asked,
                [&](int, const uint4* codes, uint32_t num_codes, const unsigned char* scales, uint32_t num_scales) {
                  tma_prefetch_bytes(codes, num_codes, policy);
                  if constexpr (Format::kTileBytes > 0) tma_prefetch_bytes(scales, num_scales, policy);
                });
    }
    asked.advance(share);
  }

  // ---- what sums are multiplied by and added to, as far as L2; x
  const int32_t out_columns = num_blocks * Storage::kColumns, first_column = first_block * Storage::kColumns;
  if (const int32_t column = first_column + static_cast<int32_t>(threadIdx.x) * 32;
      column < min(first_column + out_columns, static_cast<int32_t>(p.n))) {
    if (p.global_scale != nullptr) prefetch_l2(p.global_scale + column);
    if (p.bias != nullptr) prefetch_l2(static_cast<const Out*>(p.bias) + column);
  }
  // x in T by the copy engine, a warp a row; else by all threads.
  const auto load_x = [&](int32_t first) {
    const int32_t num = min(columns.pass, columns.num - first), first_of_x = (columns.first + first) * 64;
    const typename Format::X* source = static_cast<const typename Format::X*>(p.x) + first_of_x;
    if constexpr (kWidened) {
      constexpr int AT_ONCE = 8;  // rows whose loads are on their way together
#pragma unroll 1
      for (int32_t row = 0; row < p.m; row += AT_ONCE) {
#pragma unroll 1
        for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num * 4; i += 32 * WARPS) {
          uint4 codes[AT_ONCE] = {};
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            if (row + j < p.m) codes[j] = reinterpret_cast<const uint4*>(source + (row + j) * p.x_stride)[i];
          }
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            if (row + j >= p.m) continue;
            uint4 halves[2];
            Format::widen(halves, codes[j]);
            uint4* const target = reinterpret_cast<uint4*>(smem.x[row + j]) + 2 * i;
            target[0] = halves[0];
            target[1] = halves[1];
          }
        }
      }
      __syncwarp();
      if (lane == 0) smem.x_full.arrive();
    } else {
      if (threadIdx.x == 0) {
        smem.x_full.arrive_expect_bytes(static_cast<uint32_t>(p.m) * num * 64 * sizeof(T));
      }
      if (lane == 0) {
        for (int32_t row = warp_idx; row < p.m; row += WARPS) {
          tma_load_bytes(smem.x[row], source + row * p.x_stride, smem.x_full, num * 64 * sizeof(T));
        }
      }
    }
    __syncwarp();
  };
  grid_dependency_wait();
  // In front of the weight, behind which the copy engine would let it wait.
  load_x(0);
#pragma unroll 1
  for (int i = 0; i < STAGES; ++i) load_stage(i);

  // ---- products
  // Of the matrix that a lane points to; of four columns those that it takes.
  const uint32_t x_row = Format::kFours ? shared_address(smem.x[lane / 4]) + lane % 4 * 8
                                        : shared_address(smem.x[lane % 8]) + lane / 8 * 16;
  // Of a single product for each fragment every other one has sums of its own, so that they need not wait so long.
  constexpr int CHAINS = ROW_TILES * BLOCK_M == 8 ? 2 : 1;
  float acc[CHAINS][ROW_TILES][BLOCK_M / 8][4];
  Walk now(share), next(share);  // next: for formats with scales that come a step ahead
  typename Format::template Step<ROW_TILES, Shape::kStageTiles> step_scales;
  const auto load_scales = [&] {
    if constexpr (Format::kTileBytes == 0) {
      step_scales.load(p, (first_block + next.block) * ROW_TILES, columns.first + next.first + next.column, lane);
    }
  };
  load_scales();
  int stage_idx = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int32_t first = 0, pass = 0; first < columns.num; first += columns.pass, ++pass) {
    if (pass > 0) {
      __syncwarp();
      if (lane == 0) smem.x_empty.arrive();
      smem.x_empty.wait((pass - 1) % 2);
      load_x(first);
    }
    smem.x_full.wait(pass % 2);
    bool begins = true;  // a block, in this pass
#pragma unroll 1
    while (now.first == first) {
      const int32_t block = now.block;
      float (&sums)[BLOCK_M][Storage::kColumns + 4] = smem.sums[warp_idx + block];
      const auto each_sum = [&](auto f) {
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
          for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              f(acc[0][r][t][i], acc[CHAINS - 1][r][t][i],
                sums[t * 8 + lane % 4 * 2 + i % 2][r * 16 + lane / 4 + i / 2 * 8]);
            }
          }
        }
      };
      if (begins) {
        each_sum([&](float& a, float& other, const float& sum) {
          other = 0.0f;
          a = pass == 0 ? 0.0f : sum;
        });
      }
      if constexpr (Format::kTileBytes == 0) {
        step_scales.take();
        next.advance(share);
        if (!next.is_over(share)) load_scales();
      }
      const typename Storage::Stage& stage = smem.ring[warp_idx][stage_idx];
      uint32_t x_tile = x_row + now.column * 128;
      smem.full[warp_idx][stage_idx].wait(parity);
#pragma unroll 2
      for (int32_t tile = 0; tile < now.num; ++tile, x_tile += 128) {
        uint32_t b[BLOCK_M / 8][2][4];
#pragma unroll
        for (int t = 0; t < BLOCK_M / 8; ++t) {
          const uint32_t rows = x_tile + t * 8 * sizeof(smem.x[0]);
          if constexpr (Format::kFours) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const uint2 four = load_shared_8_bytes(rows + j * 32);
              b[t][j / 2][j % 2 * 2] = four.x;
              b[t][j / 2][j % 2 * 2 + 1] = four.y;
            }
          } else {
            ldmatrix_x4(b[t][0], rows);
            ldmatrix_x4(b[t][1], rows + 64);
          }
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          const uint4 codes = stage.codes[r][tile][lane];
          const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
          const int first_scale = tile * Format::kTileBytes + lane / 4 * (Format::kTileBytes / 8);
          const Format scales(step_scales, stage.scales[r] + first_scale, r, tile, lane);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t a[4];
            scales.make_fragment(a, words[j], j, lane);
#pragma unroll
            for (int t = 0; t < BLOCK_M / 8; ++t) {
              mma_m16n8k16<T>(acc[j % CHAINS][r][t], a, b[t][j / 2][j % 2 * 2], b[t][j / 2][j % 2 * 2 + 1]);
            }
          }
        }
      }
      __syncwarp();  // all lanes have read the stage
      load_stage(stage_idx);
      if (++stage_idx == STAGES) {
        stage_idx = 0;
        parity ^= 1;
      }
      now.advance(share);
      begins = now.block != block || now.first != first;
      if (begins) {
        each_sum([&](float a, float other, float& sum) { sum = CHAINS == 1 ? a : a + other; });
      }
    }
  }
  grid_dependency_launch();

  // ---- epilogue: a thread writes four columns, of every so many rows
  constexpr int FOURS = Storage::kColumns / 4;  // of a block
  static_assert(Shape::kMaxBlocks * FOURS <= 32 * WARPS);
  const int32_t fours = num_blocks * FOURS, four = static_cast<int32_t>(threadIdx.x) % fours;
  const int32_t rows_at_once = 32 * WARPS / fours, first_row = static_cast<int32_t>(threadIdx.x) / fours;
  const int32_t block = four / FOURS, in_block = four % FOURS * 4, column = first_column + four * 4;
  const bool is_there = first_row < rows_at_once && column < p.n;
  float factors[4] = {}, bias[4] = {};
  if (is_there) {
    if (p.bias != nullptr) load_vec<4>(static_cast<const Out*>(p.bias) + column, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      factors[i] =
          p.global_scale == nullptr ? Format::kSumFactor : Format::kSumFactor / __ldg(p.global_scale + column + i);
    }
  }
  // Which warps of a CTA have some of the block; all CTAs alike, if they have as many columns.
  W4TilesOwners<WARPS> owners(num_blocks, block, columns.pass);
  const bool alike = all_columns % num_splits == 0;
  cluster_sync();

  if (is_there) {
    for (int32_t row = rank * rows_at_once + first_row; row < p.m; row += num_splits * rows_at_once) {
      const float x_scale = p.x_scale == nullptr ? 1.0f : p.x_scale[row * p.x_scale_stride];
      float4 sum = {};
      for (int32_t split = 0; split < num_splits; ++split) {
        if (!alike) {
          owners = W4TilesOwners<WARPS>(num_blocks, block,
                                        W4TilesColumns(all_columns, split, num_splits, Shape::kPassTiles).pass);
        }
        for (int32_t warp = owners.first; warp <= owners.last; ++warp) {
          if (owners.has_none(warp)) continue;
          const auto value = load_cluster<float4>(cluster_address(&smem.sums[warp + block][row][in_block], split));
          sum.x += value.x;
          sum.y += value.y;
          sum.z += value.z;
          sum.w += value.w;
        }
      }
      const float values[4] = {sum.x * (x_scale * factors[0]) + bias[0], sum.y * (x_scale * factors[1]) + bias[1],
                               sum.z * (x_scale * factors[2]) + bias[2], sum.w * (x_scale * factors[3]) + bias[3]};
      store_vec<4>(static_cast<Out*>(p.out) + row * p.n + column, values);
    }
  }
  if (num_splits > 1) {
    __syncwarp();
    cluster_meet();  // the others may still read from this CTA
  }
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

// One of kGemmSm90W4TilesShapes, with STAGES stages of STAGE_TILES tiles of each of a block's rows of tiles.
template <int IDX, int STAGE_TILES, int STAGES, int WARPS = 8>
struct GemmSm90W4TilesShapeOf {
  static constexpr GemmSm90W4TilesShape kShape = kGemmSm90W4TilesShapes[IDX];
  static constexpr int kBlockM = kShape.block_m, kRowTiles = kShape.row_tiles, kWarps = WARPS;
  static constexpr int kPassTiles = kShape.pass_tiles, kMaxBlocks = kShape.max_blocks;
  static constexpr int kStageTiles = STAGE_TILES, kStages = STAGES;
};

template <typename Format, typename Shape>
cudaError_t launch_gemm_sm90_w4_tiles(const GemmSm90W4Params& p, const GemmSm90W4TilesConfig& config,
                                      cudaStream_t stream) {
  using Storage = GemmSm90W4TilesStorage<Format, Shape>;
  static_assert(sizeof(Storage) <= 227 * 1024);
  return launch_clusters(gemm_sm90_w4_tiles_kernel<Format, Shape>, config.num_ctas, config.num_splits,
                         32 * Shape::kWarps, sizeof(Storage), stream, GemmSm90W4TilesArgs{p, config});
}

template <typename Format>
cudaError_t run_gemm_sm90_w4_tiles(const GemmSm90W4Params& p, const GemmSm90W4TilesConfig& config,
                                   cudaStream_t stream) {
  static_assert(std::size(kGemmSm90W4TilesShapes) == 2);
  switch (config.shape.block_m) {
    case 8:
      return launch_gemm_sm90_w4_tiles<Format, GemmSm90W4TilesShapeOf<0, 8, 2>>(p, config, stream);
    case 16:
      return launch_gemm_sm90_w4_tiles<Format, GemmSm90W4TilesShapeOf<1, 4, 2>>(p, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
