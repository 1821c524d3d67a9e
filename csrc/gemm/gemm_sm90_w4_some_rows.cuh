// The Hopper GEMM for 9 to 64 rows of x and a weight of 4 bits in tiles: memory's rate, with tensor cores that take
// what four groups of warps make.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once
//   x (M, K)   weight (N / 16, K / 64) tiles (fastattn/reference/w4_tiles.py)   out (M, N)
//
//                x: all rows, a half brought by either         A cluster has a run of rows of tiles, of which its two
//                CTA of a pair, for both                       halves have equal shares, up to 16, and shares of K.
//               ┌──────────────────────────────────┐           A warp has one row of tiles, and makes wgmma's left
//   tiles       │ warp 0   16 x block_m            │  CTA 0    operand of it in registers; four of them, one group,
//   of 16 rows  │ warp 1                           │           multiply it by the same x.
//   of weight   │ …                                │
//               ├──────────────────────────────────┤
//               │ warp 0                           │  CTA 1
//               │ …                                │
//               └──────────────────────────────────┘
//
//   a warp       x and codes and scales of 256 columns ─► … of the next ones, as far as the ring has place
//   16 warps     A fragments of a tile, two products each of which the tensor cores run while the next are made
//   then         sums to shared memory │ each CTA adds up those of the splits, in their order │ bias, round, store
//
// Where a CTA has four rows of tiles or fewer, one group would be alone with them, a warp to each scheduler, and wait
// for its own instructions. Then all four groups have the same rows, and of the columns every fourth stage: four parts
// of a sum. A stage has place for four rows of tiles only, and there are more of them.
//
// Limits: 16-byte aligned rows of x, K a multiple of 64, N of 16. Columns past K are zeros in shared memory.
#pragma once

#include <algorithm>
#include <iterator>

#include "arch/cluster.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/tensor_map.h"
#include "arch/tma.cuh"
#include "arch/vec.cuh"
#include "arch/wgmma.cuh"
#include "gemm/gemm_sm90_operands.cuh"
#include "gemm/gemm_sm90_w4_some_rows_config.h"
#include "gemm/gemm_sm90_w4_tiles_formats.cuh"

namespace fastattn {

struct GemmSm90W4SomeRowsArgs {
  GemmSm90W4Params p;
  GemmSm90W4SomeRowsConfig config;
  CUtensorMap x, codes, scales;
};

template <typename Format, int BLOCK_M, int ROW_TILES>
struct GemmSm90W4SomeRowsStorage {
  static constexpr int kRowTiles = ROW_TILES, kStageTiles = 4;
  static constexpr int kParts = kGemmSm90W4SomeRowsTiles / kRowTiles;  // of a sum
  static constexpr uint32_t kPanelBytes = BLOCK_M * 128;               // of x: a tile's columns
  static constexpr uint32_t kXBytes = kStageTiles * kPanelBytes;
  static constexpr uint32_t kCodeBytes = kRowTiles * kStageTiles * 512;
  // FP4's scales of a row of tiles. Of 128 bytes (MXFP4) the chunks of 16 change places within eight rows.
  static constexpr int kScaleRowBytes = kStageTiles * Format::kTileBytes;
  static constexpr bool kSwizzled = kScaleRowBytes == 128;
  static constexpr uint32_t kScaleBytes = (kSwizzled ? std::max(kRowTiles, 8) : kRowTiles) * kScaleRowBytes;
  // A stage is always the same part's: of another's it would not see each phase, and could not tell one from the next.
  static constexpr int kStages = (227 * 1024 - 2048) / (kXBytes + kCodeBytes + kScaleBytes) / kParts * kParts;

  // Where a lane's scales lie in those of a stage.
  __device__ __forceinline__ static uint32_t scales_of_lane(int row_tile, int tile, int lane) {
    const uint32_t place = tile * Format::kTileBytes + lane / 4 * (Format::kTileBytes / 8);
    return row_tile * kScaleRowBytes + (kSwizzled ? place ^ row_tile % 8 * 16 : place);
  }

  struct Ring {
    alignas(1024) unsigned char x[kStages][kStageTiles][kPanelBytes];
    alignas(1024) uint4 codes[kStages][kRowTiles][kStageTiles][32];
    alignas(1024) unsigned char scales[kStages][std::max<uint32_t>(kScaleBytes, 1)];
  };
  union {
    Ring ring;
    // When the ring is no longer needed. Rows are 4 sums apart modulo 16, so that the accumulators of a warp go to all
    // banks.
    float sums[kParts][BLOCK_M][16 * kRowTiles + 4];
  };
  MBarrier full[kStages], empty[kStages];
};

template <typename Format, int BLOCK_M, int ROW_TILES>
__global__ void __launch_bounds__(kGemmSm90W4SomeRowsThreads, 1)
    gemm_sm90_w4_some_rows_kernel(const __grid_constant__ GemmSm90W4SomeRowsArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Format::T;
  using Storage = GemmSm90W4SomeRowsStorage<Format, BLOCK_M, ROW_TILES>;
  using Product = Wgmma<T, BLOCK_M>;
  constexpr int STAGES = Storage::kStages, STAGE_TILES = Storage::kStageTiles, PARTS = Storage::kParts;
  constexpr int WARPS = kGemmSm90W4SomeRowsTiles;  // that multiply
  constexpr int SHARERS = kGemmSm90W4SomeRowsSharers, SHARE_M = BLOCK_M / SHARERS;

  Storage& smem = shared_storage_of_1024<Storage>();
  const GemmSm90W4Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t num_splits = args.config.num_splits;
  const int32_t rank = static_cast<int32_t>(cluster_rank()), split = rank / SHARERS, sharer = rank % SHARERS;
  const int32_t num_clusters = static_cast<int32_t>(args.config.num_ctas) / (num_splits * SHARERS);
  const int32_t cluster = static_cast<int32_t>(blockIdx.x) / (num_splits * SHARERS);

  // ---- rows of tiles: a CTA without one takes the last one once more, and stores nothing.
  const int32_t all_rows = static_cast<int32_t>(p.n / 16), all_columns = static_cast<int32_t>(p.k / 64);  // tiles
  const int32_t first_of_cluster = cluster * all_rows / num_clusters;
  const int32_t num_of_cluster = (cluster + 1) * all_rows / num_clusters - first_of_cluster;
  const auto first_of = [&](int32_t idx) { return idx * num_of_cluster / SHARERS; };
  const auto num_of = [&](int32_t idx) { return first_of(idx + 1) - first_of(idx); };
  const auto num_groups_of = [&](int32_t idx) { return (max(num_of(idx), 1) + 3) / 4; };
  const int32_t num_own = num_of(sharer), num_rows = max(num_own, 1);
  const int32_t first_row = min(first_of_cluster + first_of(sharer), all_rows - 1);
  const int32_t all_steps = (all_columns - 1) / STAGE_TILES + 1;
  const int32_t begin = split * all_steps / num_splits, end = (split + 1) * all_steps / num_splits;

  if (warp_idx == WARPS && lane == 0) {
    tma_prefetch_map(args.codes);
    if constexpr (Format::kTileBytes > 0) tma_prefetch_map(args.scales);
    tma_prefetch_map(args.x);
    int32_t num_warps = 0;
    for (int i = 0; i < SHARERS; ++i) num_warps += 4 * num_groups_of(i);
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(num_warps);
    }
    fence_barrier_init();
  }
  __syncwarp();
  cluster_arrive();

  // By all, also those that have no part in it: of a barrier of some racecheck takes others' reads of sums for a race.
  const auto ring_is_free = [] { named_barrier_sync(1, kGemmSm90W4SomeRowsThreads); };
  RingPosition<STAGES> position;
  if (warp_idx == WARPS) {
    // ------------------------------------------------------------------------------- producer
    // A box behind M costs more than one of rows: what it would bring is multiplied, but not stored.
    const int32_t num_shares = min(SHARERS, (static_cast<int32_t>(p.m) + SHARE_M - 1) / SHARE_M);
    const uint32_t num_bytes = static_cast<uint32_t>(args.config.box_tiles) * STAGE_TILES * (512 + Format::kTileBytes) +
                               num_shares * Storage::kXBytes / SHARERS;
    const uint64_t policy = evict_first_policy();
    const auto load_weight = [&](int32_t step, uint32_t stage) {
      MBarrier& full = smem.full[stage];
      full.arrive_expect_bytes(num_bytes);
      tma_load_4d(smem.ring.codes[stage], args.codes, full, 0, step * STAGE_TILES, first_row, 0, policy);
      if constexpr (Format::kTileBytes > 0) {
        tma_load_4d(smem.ring.scales[stage], args.scales, full, step * Storage::kScaleRowBytes, first_row, 0, 0,
                    policy);
      }
    };
    if (lane == 0) {
      const int32_t end_of_ring = min(begin + STAGES, end);
      for (int32_t step = begin; step < end_of_ring; ++step) {
        tma_prefetch_4d(args.codes, 0, step * STAGE_TILES, first_row, 0, policy);
        if constexpr (Format::kTileBytes > 0) {
          tma_prefetch_4d(args.scales, step * Storage::kScaleRowBytes, first_row, 0, 0, policy);
        }
      }
      grid_dependency_wait();
      for (int32_t step = begin; step < end_of_ring; ++step) load_weight(step, static_cast<uint32_t>(step - begin));
    }
    __syncwarp();
    cluster_wait();  // x comes to the others too
    if (lane == 0) {
      for (int32_t step = begin; step < end; ++step) {
        const uint32_t stage = position.stage();
        MBarrier& full = smem.full[stage];
        if (step - begin >= STAGES) {
          smem.empty[stage].wait(position.parity() ^ 1);
          load_weight(step, stage);
        }
        for (int t = 0; t < STAGE_TILES && sharer < num_shares; ++t) {
          tma_load_4d_multicast(smem.ring.x[stage][t] + sharer * SHARE_M * 128, args.x, full,
                                (step * STAGE_TILES + t) * 64, sharer * SHARE_M, 0, 0,
                                static_cast<uint16_t>(((1 << SHARERS) - 1) << split * SHARERS));
        }
        position.advance();
      }
    }
    __syncwarp();
    grid_dependency_launch();
    ring_is_free();
  } else {
    // ------------------------------------------------------------------------------ consumers
    cluster_wait();
    grid_dependency_wait();
    const int part = warp_idx / ROW_TILES, row_tile = warp_idx % ROW_TILES;
    if (row_tile / 4 < num_groups_of(sharer)) {
      const int own = min(row_tile, num_rows - 1);  // below the last one stands that one
      const WgmmaDescriptor first_x = WgmmaDescriptor::make<128>(smem.ring.x[0][0], 0);
      typename Format::template Step<1, STAGE_TILES> step_scales;
      const auto load_scales = [&](int32_t step) {
        if constexpr (Format::kTileBytes == 0) step_scales.load(p, first_row + own, step * STAGE_TILES, lane);
      };
      const int32_t first_step = begin + part;
      load_scales(min(first_step, end - 1));
      float acc[BLOCK_M / 8][4];
      uint32_t a[2][2][4];  // two sets of two fragments
      uint32_t last_stage = 0;
      const auto release_last = [&] {
        if (lane < SHARERS) smem.empty[last_stage].arrive_at_cta(split * SHARERS + lane);
      };
      position.count = part;
#pragma unroll 1
      for (int32_t step = first_step; step < end; step += PARTS) {
        if constexpr (Format::kTileBytes == 0) {
          step_scales.take();
          load_scales(min(step + PARTS, end - 1));
        }
        const uint32_t stage = position.stage();
        smem.full[stage].wait(position.parity());
        const WgmmaDescriptor stage_x = first_x.uniform_plus(stage * Storage::kXBytes);
#pragma unroll
        for (int tile = 0; tile < STAGE_TILES; ++tile) {
          const uint4 codes = smem.ring.codes[stage][own][tile][lane];
          const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
          const unsigned char* const its_scales = smem.ring.scales[stage] + Storage::scales_of_lane(own, tile, lane);
          const Format scales(step_scales, its_scales, 0, tile, lane);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            wgmma_wait<1>();
            pin_registers(a[i]);
            if (PARTS == 1 && tile == 0 && i == 1 && step > begin) release_last();
#pragma unroll
            for (int j = 0; j < 2; ++j) scales.make_fragment(a[i][j], words[2 * i + j], 2 * i + j, lane);
            const WgmmaDescriptor x = {stage_x.low + tile * (Storage::kPanelBytes / 16), stage_x.high};
            wgmma_fence();
            Product::rs_k(acc, a[i][0], x.plus(i * 64), tile > 0 || i > 0 || step > first_step);
            Product::rs_k(acc, a[i][1], x.plus(i * 64 + 32), 1);
            wgmma_commit();
          }
        }
        last_stage = stage;
        position.count += PARTS;
        // Its next stage may be one that waits for this one; the other groups' products run meanwhile.
        if constexpr (PARTS > 1) {
          wgmma_wait<0>();
          pin_registers(a[0]);
          pin_registers(a[1]);
          release_last();
        }
      }
      wgmma_wait<0>();
      pin_registers(a[0]);
      pin_registers(a[1]);
      pin_registers(acc);
      ring_is_free();
      const bool has_steps = PARTS == 1 || first_step < end;
#pragma unroll
      for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = smem.sums[part][t * 8 + lane % 4 * 2 + i % 2][row_tile * 16 + lane / 4 + i / 2 * 8];
          sum = has_steps ? acc[t][i] : 0.0f;
        }
      }
    } else {
      ring_is_free();
    }
  }

  // ---- epilogue: a thread writes four columns, of every so many rows
  const int32_t fours = 4 * num_rows, four = static_cast<int32_t>(threadIdx.x) % fours;
  const int32_t rows_at_once = 32 * WARPS / fours, first_m = static_cast<int32_t>(threadIdx.x) / fours;
  const int32_t column = first_row * 16 + four * 4;
  const bool is_there = first_m < rows_at_once && num_own > 0;
  float factors[4] = {}, bias[4] = {};
  if (is_there) {
    if (p.bias != nullptr) load_vec<4>(static_cast<const T*>(p.bias) + column, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      factors[i] =
          p.global_scale == nullptr ? Format::kSumFactor : Format::kSumFactor / __ldg(p.global_scale + column + i);
    }
  }
  __syncwarp();
  if (num_splits > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (is_there) {
    for (int32_t row = split * rows_at_once + first_m; row < p.m; row += num_splits * rows_at_once) {
      float4 sum = {};
#pragma unroll 4
      for (int32_t other = 0; other < num_splits * PARTS; ++other) {
        const float* const its_sums = smem.sums[other % PARTS][row] + four * 4;
        const auto value = load_cluster<float4>(cluster_address(its_sums, other / PARTS * SHARERS + sharer));
        sum.x += value.x;
        sum.y += value.y;
        sum.z += value.z;
        sum.w += value.w;
      }
      const float values[4] = {sum.x * factors[0] + bias[0], sum.y * factors[1] + bias[1], sum.z * factors[2] + bias[2],
                               sum.w * factors[3] + bias[3]};
      store_vec<4>(static_cast<T*>(p.out) + row * p.n + column, values);
    }
  }
  __syncwarp();
  cluster_meet();  // the others may still read from this CTA
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Format, int BLOCK_M, int ROW_TILES>
cudaError_t launch_gemm_sm90_w4_some_rows(const GemmSm90W4Params& p, const GemmSm90W4SomeRowsConfig& config,
                                          cudaStream_t stream) {
  using Storage = GemmSm90W4SomeRowsStorage<Format, BLOCK_M, ROW_TILES>;
  static_assert(sizeof(Storage) <= 227 * 1024);
  GemmSm90W4SomeRowsArgs args = {p, config, {}, {}, {}};
  const int64_t row_tiles = p.n / 16, num_tiles = p.k / 64;
  cudaError_t error = make_tensor_map(
      &args.x, {p.x, p.dtype, {p.k, p.m, 1, 1}, {p.x_stride, 0, 0}, 64, BLOCK_M / kGemmSm90W4SomeRowsSharers});
  if (error == cudaSuccess) {
    // Two bytes at a time, whatever they mean: a box has at most 256 in a row.
    error = make_tensor_map(&args.codes, {p.weight,
                                          DType::kBFloat16,
                                          {256, num_tiles, row_tiles, 1},
                                          {256, num_tiles * 256, 0},
                                          256,
                                          Storage::kStageTiles,
                                          true,
                                          config.box_tiles});
  }
  if (error == cudaSuccess && Format::kTileBytes > 0) {
    const int64_t row_bytes = num_tiles * Format::kTileBytes;
    error = make_tensor_map(&args.scales, {p.weight_scale,
                                           DType::kFloat8E4M3,
                                           {row_bytes, row_tiles, 1, 1},
                                           {row_bytes, 0, 0},
                                           Storage::kScaleRowBytes,
                                           config.box_tiles});
  }
  if (error != cudaSuccess) return error;
  return launch_clusters(gemm_sm90_w4_some_rows_kernel<Format, BLOCK_M, ROW_TILES>, config.num_ctas,
                         config.num_splits * kGemmSm90W4SomeRowsSharers, kGemmSm90W4SomeRowsThreads, sizeof(Storage),
                         stream, args);
}

template <typename Format, int BLOCK_M>
cudaError_t launch_gemm_sm90_w4_some_rows(const GemmSm90W4Params& p, const GemmSm90W4SomeRowsConfig& config,
                                          cudaStream_t stream) {
  return config.box_tiles <= kGemmSm90W4SomeRowsGroup
             ? launch_gemm_sm90_w4_some_rows<Format, BLOCK_M, kGemmSm90W4SomeRowsGroup>(p, config, stream)
             : launch_gemm_sm90_w4_some_rows<Format, BLOCK_M, kGemmSm90W4SomeRowsTiles>(p, config, stream);
}

template <typename Format>
cudaError_t run_gemm_sm90_w4_some_rows(const GemmSm90W4Params& p, const GemmSm90W4SomeRowsConfig& config,
                                       cudaStream_t stream) {
  static_assert(std::size(kGemmSm90W4SomeRowsBlocks) == 4);
  switch (config.block_m) {
    case 16:
      return launch_gemm_sm90_w4_some_rows<Format, 16>(p, config, stream);
    case 32:
      return launch_gemm_sm90_w4_some_rows<Format, 32>(p, config, stream);
    case 48:
      return launch_gemm_sm90_w4_some_rows<Format, 48>(p, config, stream);
    case 64:
      return launch_gemm_sm90_w4_some_rows<Format, 64>(p, config, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
