// The Hopper GEMM for weights of 4 bits and many rows of x: as for few rows the weight becomes wgmma's left operand in
// registers, and what is made is multiplied by up to 256 rows of x, so that the tensor cores have longer to do than it
// takes.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once
//   x (M, K)   weight: tiles of codes, and scales as they want them (gemm_sm90_w4_tiled_operands.cuh)   out (M, N)
//
//                         x tile (block_m x 128 bytes), half of it
//                         loaded by each CTA of a cluster, for both
//                        ┌───────────────────────────────────┐
//              ┌─────┐   │                                   │
//   cluster    │  w  │   │ group 0: 64 x block_m             │   CTA 0       a ring in shared memory: panels
//   of two:    │ 128 │   │ group 1: 64 x block_m             │               of x, 128 bytes of a row, and
//   256 rows   ├─────┤   ├───────────────────────────────────┤               codes of the same columns
//   of weight  │  w  │   │ group 0                           │   CTA 1
//              │ 128 │   │ group 1                           │
//              └─────┘   └───────────────────────────────────┘
//
//   a warp               codes(k), half of x(k) for both CTAs ─► codes(k+1), half of x(k+1) ─► … on to the next tile
//   group 0              k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …       (a panel: gemm_sm90_w4_tiled_operands.cuh)
//   group 1              k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//
// How rows of out leave: gemm_sm90_transposed_rows.cuh.
//
// Clusters walk over tiles in groups of config.group_rows rows of tiles, column by column, as in gemm_sm90.cuh.
//
// With config.stream_k they share the stages of all tiles instead: gemm_sm90_stream_k.cuh.
//
// Limits: 16-byte aligned rows of x, K a multiple of 64, N of 8, groups as GemmSm90W4Params has them. Rows past M or N
// and columns past K are zeros in shared memory.
#pragma once

#include <algorithm>

#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/launch_id.h"
#include "arch/registers.cuh"
#include "arch/tensor_map.h"
#include "arch/tma.cuh"
#include "gemm/gemm_sm90_stream_k.cuh"
#include "gemm/gemm_sm90_transposed_rows.cuh"
#include "gemm/gemm_sm90_w4_tiled_operands.cuh"

namespace fastattn {

struct GemmSm90W4ManyRowsArgs {
  GemmSm90W4Params p;
  CUtensorMap x, weight;
};

constexpr int kGemmSm90W4Consumers = kGemmSm90StreamKGroups;          // warp groups
constexpr int kGemmSm90W4Threads = 128 * (kGemmSm90W4Consumers + 1);  // and one of which a warp loads
constexpr int kGemmSm90W4CtaN = 64 * kGemmSm90W4Consumers;            // rows of weight
constexpr int kGemmSm90W4SmemBytes = 227 * 1024;                      // of a CTA
constexpr int kGemmSm90W4ConsumerRegisters = 232, kGemmSm90W4ProducerRegisters = 40;

template <typename Operands, int BLOCK_M>
struct GemmSm90W4ManyRowsStorage {
  using Rows = GemmSm90TransposedRows<typename Operands::Out, BLOCK_M, sizeof(typename Operands::Element) == 1,
                                      std::min(BLOCK_M, 64)>;
  static constexpr int kPanel = 128 / sizeof(typename Operands::Element);  // columns
  static constexpr int kTiles = kPanel / kW4TileK, kRowTiles = kGemmSm90W4CtaN / kW4TileRows;
  static constexpr uint32_t kXBytes = BLOCK_M * 128, kCodeBytes = kRowTiles * kTiles * kW4TileBytes;
  static constexpr int kBytes =
      kGemmSm90W4SmemBytes - kGemmSm90W4Consumers * sizeof(Rows) - sizeof(typename Operands::Shared);
  static constexpr int kStages = std::min<int>(16, kBytes / (kXBytes + kCodeBytes + 2 * sizeof(MBarrier)));

  alignas(1024) unsigned char x[kStages][kXBytes];
  alignas(128) unsigned char codes[kStages][kRowTiles][kTiles][kW4TileBytes];
  Rows rows[kGemmSm90W4Consumers];
  typename Operands::Shared shared;
  MBarrier full[kStages], empty[kStages];
};

template <typename Operands, int BLOCK_M>
__global__ void __launch_bounds__(kGemmSm90W4Threads, 1)
    gemm_sm90_w4_many_rows_kernel(const __grid_constant__ GemmSm90W4ManyRowsArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Operands::Out;
  using Storage = GemmSm90W4ManyRowsStorage<Operands, BLOCK_M>;
  using Handed = GemmSm90HandedSums<float, BLOCK_M / 8>;
  constexpr int STAGES = Storage::kStages, PANEL = Storage::kPanel;
  constexpr int STAGE_K = kGemmSm90W4StageK;
  constexpr int NUM_CTAS = 2;  // of a cluster
  constexpr int NUM_WARPS = 4 * kGemmSm90W4Consumers;

  Storage& smem = shared_storage_of_1024<Storage>();
  const GemmSm90W4Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t rank = static_cast<int32_t>(cluster_rank());

  if (threadIdx.x == 0) {
    tma_prefetch_map(args.x);
    tma_prefetch_map(args.weight);
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(NUM_CTAS * NUM_WARPS);
    }
    fence_barrier_init();
  }
  smem.shared.fill();
  __syncwarp();
  cluster_meet();
  grid_dependency_launch();
  grid_dependency_wait();

  // ---- which tiles
  const int32_t n_tiles = static_cast<int32_t>(p.config.n_tiles);  // of clusters
  const int32_t num_tiles = static_cast<int32_t>(p.config.m_tiles) * n_tiles;
  const int32_t cluster = static_cast<int32_t>(blockIdx.x) / NUM_CTAS;
  const int32_t num_clusters = static_cast<int32_t>(gridDim.x) / NUM_CTAS;
  const int32_t num_stages = (static_cast<int32_t>(p.k) - 1) / STAGE_K + 1;
  const auto walk = GemmSm90Walk::make(num_tiles, num_stages, p.config.stream_k, cluster, num_clusters);
  struct Tile {
    int32_t first_m, first_n;
  };
  const auto tile_of = [&](int32_t idx) {
    const int32_t group_rows = p.config.group_rows;
    const int32_t group = idx / (group_rows * n_tiles);
    const int32_t in_group = idx - group * group_rows * n_tiles;
    const int32_t rows = min(group_rows, static_cast<int32_t>(p.config.m_tiles) - group * group_rows);
    const int32_t column = in_group / rows;
    const int32_t row = group * group_rows + in_group - column * rows;
    return Tile{row * BLOCK_M, (column * NUM_CTAS + rank) * kGemmSm90W4CtaN};
  };

  if (warp_idx >= NUM_WARPS) {
    // ------------------------------------------------------------------------------- producer
    give_registers<kGemmSm90W4ProducerRegisters>();
    RingPosition<STAGES> position;
    if (warp_idx == NUM_WARPS && lane == 0) {
      constexpr int HALF_M = BLOCK_M / NUM_CTAS;
      for (int32_t part = 0; part < walk.num_parts; ++part) {
        const Tile tile = tile_of(walk.tile(part));
        // A box behind M costs more than one of rows: what it would bring is multiplied, but not stored.
        const bool both = tile.first_m + HALF_M < p.m;
        const uint32_t num_x_bytes = both ? Storage::kXBytes : Storage::kXBytes / NUM_CTAS;
#pragma unroll 1
        for (int32_t column = walk.begin(part) * STAGE_K; column < walk.end(part) * STAGE_K; column += PANEL) {
          const uint32_t stage = position.stage();
          smem.empty[stage].wait(position.parity() ^ 1);
          smem.full[stage].arrive_expect_bytes(Storage::kCodeBytes + num_x_bytes);
          tma_load_4d(smem.codes[stage], args.weight, smem.full[stage], 0, column / kW4TileK,
                      tile.first_n / kW4TileRows, 0);
          if (both || rank == 0) {
            tma_load_4d_multicast(smem.x[stage] + rank * HALF_M * 128, args.x, smem.full[stage], column,
                                  tile.first_m + rank * HALF_M, 0, 0, 3);
          }
          position.advance();
        }
      }
    }
    __syncwarp();
  } else {
    // ------------------------------------------------------------------------------ consumers
    take_registers<kGemmSm90W4ConsumerRegisters>();
    const int group = warp_idx / 4;
    const int32_t n_of_lane = warp_idx * 16 + lane / 4;  // of a tile, and the one 8 below
    const uint32_t first_codes = shared_address(smem.codes[0][warp_idx]) + lane * 16;
    const uint32_t shared = shared_address(&smem.shared);
    const WgmmaDescriptor first_x = WgmmaDescriptor::make<128>(smem.x[0], 0);
    RingPosition<STAGES> position;
    uint32_t last_stage = 0;
    const auto release_last = [&] {
      if (lane < NUM_CTAS) smem.empty[last_stage].arrive_at_cta(lane);
    };
    GemmSm90W4TileScales<Operands> scales;
    Tile next = tile_of(walk.tile(0));
    scales.begin(p, next.first_n + warp_idx * kW4TileRows, lane);
    scales.load(p, walk.begin(0), lane);
    float acc[BLOCK_M / 8][4];
    uint32_t a[2][2][4];
#pragma unroll 1
    for (int32_t part = 0; part < walk.num_parts; ++part) {
      const Tile tile = next;
      const int32_t next_part = min(part + 1, walk.num_parts - 1);
      const int32_t begin = walk.begin(part), end = walk.end(part), next_begin = walk.begin(next_part);
      next = tile_of(walk.tile(next_part));
      float factors[2], bias[2] = {};
      typename Storage::Rows::OwnScales x_scales;
      const int32_t num_rows = static_cast<int32_t>(p.m);
      Storage::Rows::fetch(x_scales, tile.first_m, num_rows, [&](int64_t row) { return Operands::x_scale(p, row); });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = min(tile.first_n + n_of_lane + i * 8, static_cast<int32_t>(p.n) - 1);
        factors[i] = Operands::column_factor(p, row);
        if (p.bias != nullptr) bias[i] = to_float(static_cast<const T*>(p.bias)[row]);
      }
#pragma unroll 1
      for (int32_t i = begin; i < end; ++i) {
        scales.take();
        const bool is_last = i == end - 1;
        if (is_last) scales.begin(p, next.first_n + warp_idx * kW4TileRows, lane);
        scales.load(p, is_last ? next_begin : i + 1, lane);
#pragma unroll
        for (int panel = 0; panel < STAGE_K / PANEL; ++panel) {
          const bool is_first = panel == 0 && i == begin;
          const uint32_t stage = position.stage();
          smem.full[stage].wait(position.parity());
          const auto released = [&](int step) {
            if (step == 1 && !is_first) release_last();
          };
          multiply_w4_panel<Operands, BLOCK_M>(
              acc, a, first_codes + stage * Storage::kCodeBytes, scales, panel * Storage::kTiles, shared,
              first_x.uniform_plus(stage * Storage::kXBytes), is_first, lane, released);
          last_stage = stage;
          position.advance();
        }
      }
      wgmma_wait<0>();
      pin_registers(a[0]);
      pin_registers(a[1]);
      pin_registers(acc);
      release_last();
      if (end < num_stages) {
        const Handed handed(p, blockIdx.x, group);
        handed.put(acc);
        handed.hand_on(p.launch_id, 1 + group);
        continue;
      }
      if (begin > 0) {
        const int32_t first_stage = walk.tile(part) * num_stages;
        int32_t other = cluster;
        do {
          --other;
          const Handed handed(p, other * NUM_CTAS + rank, group);
          handed.await(p.launch_id, 1 + group);
          handed.add_to(acc);
        } while (GemmSm90Walk::run_begin(num_tiles * num_stages, other, num_clusters) > first_stage);
      }
      smem.rows[group].store(acc, x_scales, factors, bias, static_cast<T*>(p.out), p.n, tile.first_m, num_rows,
                             tile.first_n + group * 64, 1 + group);
    }
  }
  cluster_meet();  // the other CTA may still write to this one
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Operands, int BLOCK_M>
cudaError_t launch_gemm_sm90_w4_many_rows(const GemmSm90W4Params& p, cudaStream_t stream) {
  using Storage = GemmSm90W4ManyRowsStorage<Operands, BLOCK_M>;
  static_assert(sizeof(Storage) <= kGemmSm90W4SmemBytes);
  GemmSm90W4ManyRowsArgs args = {p, {}, {}};
  cudaError_t error = make_tensor_map(
      &args.x, {p.x, Operands::kDType, {p.k, p.m, 1, 1}, {p.x_stride, 0, 0}, Storage::kPanel, BLOCK_M / 2});
  if (error == cudaSuccess) {
    // Two bytes at a time, whatever they mean: a box has at most 256 in a row.
    constexpr int kTile = kW4TileBytes / 2;
    const int64_t num_tiles = p.k / kW4TileK;
    error = make_tensor_map(&args.weight, {p.weight,
                                           DType::kBFloat16,
                                           {kTile, num_tiles, (p.n - 1) / kW4TileRows + 1, 1},
                                           {kTile, num_tiles * kTile, 0},
                                           kTile,
                                           Storage::kTiles,
                                           true,
                                           Storage::kRowTiles});
  }
  if (error != cudaSuccess) return error;
  if (p.config.stream_k) args.p.launch_id = new_launch_id();
  return launch_clusters(gemm_sm90_w4_many_rows_kernel<Operands, BLOCK_M>, p.config.num_ctas, 2, kGemmSm90W4Threads,
                         sizeof(Storage), stream, args);
}

// Which exist, for every kind: add a case here and a tile in gemm_sm90_w4_config.h.
template <typename Operands>
cudaError_t run_gemm_sm90_w4_many_rows(const GemmSm90W4Params& p, cudaStream_t stream) {
  switch (p.config.tile.block_m) {
    case 64:
      return launch_gemm_sm90_w4_many_rows<Operands, 64>(p, stream);
    case 128:
      return launch_gemm_sm90_w4_many_rows<Operands, 128>(p, stream);
    case 192:
      if constexpr (!Operands::kTwoLevels) return launch_gemm_sm90_w4_many_rows<Operands, 192>(p, stream);
      return cudaErrorInvalidValue;
    case 256:
      if constexpr (!Operands::kTwoLevels) return launch_gemm_sm90_w4_many_rows<Operands, 256>(p, stream);
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
