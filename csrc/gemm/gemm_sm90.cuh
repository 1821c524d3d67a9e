// The GEMM on Hopper's tensor cores and copy engine: pairs of CTAs that share a weight tile, one tile after the other.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once; what there is for
//   x (M, K)   weight (N, K)   out (M, N)                  8 bits: gemm_sm90_operands.cuh, of norms: gemm_sm90_norm.cuh
//                                                          of gates: gemm_sm90_epilogue.cuh
//
//                         weight tile (block_n x 128 bytes), half of it
//                         loaded by each CTA of a cluster, for both
//                        ┌───────────────────────────────────┐
//              ┌─────┐   │                                   │
//   cluster    │  x  │   │ group 0: 64 x block_n             │   CTA 0       stages of a ring in shared memory:
//   of two:    │ 128 │   │ group 1: 64 x block_n             │               ┌───────┬───────┬───────┬───────┐
//   256 rows   ├─────┤   ├───────────────────────────────────┤               │ k     │ k + 1 │ k + 2 │ k + 3 │
//              │  x  │   │ group 0                           │   CTA 1       └───────┴───────┴───────┴───────┘
//              │ 128 │   │ group 1                           │
//              └─────┘   └───────────────────────────────────┘
//
//   a warp               x(k) ─► half of weight(k) for both CTAs ─► x(k+1) ─► … from one tile on to the next
//   group 0              k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//   group 1              k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//
// With turns, a group has every other tile for itself, all 128 rows, and writes while the other multiplies:
//
//   group 0              k=0 │ 1 │ … │ K-1 │ write               │ k=0 │ 1 │ … │ K-1 │ write
//   group 1              write             │ k=0 │ 1 │ … │ K-1 │ write               │ k=0 │ 1 │ …
//
// Its turn ends when it has issued its last products. The other looks at no stage before: a barrier that is two phases
// behind cannot be told from one whose phase is over. Sums in two levels leave no registers for all rows: groups share
// a tile, and a turn is a part of a step.
//
// Tiles of 192 rows have three groups, in none of these turns.
//
// Where tiles are fewer than pairs of SMs, clusters share the stages of all tiles of 128 x 256, or of most products' of
// 128 x 128, instead: gemm_sm90_stream_k.cuh. Not with turns in which a group has a tile for itself.
//
// Rows of x are shared out evenly: a CTA has config.rows of them, as many as there are rows in a box of x, up to its
// tile's. What lies in the place of others was there before, and is multiplied, but not stored.
//
// A stage is free when the groups of both CTAs are done with it, since both halves of its weight tile are overwritten
// by one of them each. Rows are written straight from registers, 64 bytes at a time, while the next tile's stages
// arrive. What a column is multiplied by and what is added to it comes to shared memory while products run: the
// epilogue waits for nothing.
//
// Clusters walk over tiles in groups of config.group_rows rows of tiles, column by column, so that those that run at
// the same time share x and weight in the L2 cache.
//
// Of norms of x's rows, what a row's sums are turned into results with comes from a kernel that runs beside the first
// tiles: gemm_row_norms_sm90.cu. An SM has room for both where gemm_sm90_leaves_room says so.
//
// Limits: 16-byte aligned rows, N a multiple of 8, K of 16 bytes. Rows past N and columns past K are zeros in shared
// memory.
#pragma once

#include <iterator>

#include "arch/launch_id.h"
#include "gemm/gemm_sm90_launch.h"
#include "gemm/gemm_sm90_stream_k.cuh"
#include "gemm/gemm_sm90_tiles.cuh"

namespace fastattn {

// Three groups, two in turns and those of wide tiles, which get others' sums, need more registers than threads begin
// with, and have those of one more, which loads. Where a norm's CTA is to run beside them, tiles have as few as if
// there were 512 threads, and these sums come by fewer at a time.
template <int BLOCK_M, int BLOCK_N, bool TURNS, bool NORMED>
struct GemmSm90ManyRowsThreads {
  static constexpr int kConsumers = BLOCK_M / 64;
  static constexpr bool kMovesRegisters = TURNS || kConsumers > 2 || (kConsumers == 2 && BLOCK_N == 256);
  static constexpr int kNum = 128 * kConsumers + (kMovesRegisters ? 128 : 32);
  // Whether the kernel that gives norms may run at the same time.
  static constexpr bool kBesideNorms = NORMED && gemm_sm90_leaves_room({BLOCK_M, BLOCK_N, 1, TURNS});
  static constexpr int kBound = kBesideNorms && kConsumers == 2 ? 512 : kNum;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160, kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kSumsAtOnce = kBesideNorms ? 2 : 8;  // by fours
};

template <typename Operands, int BLOCK_M, int BLOCK_N, bool TURNS, typename Epilogue>
constexpr bool kGemmSm90Streams =
    gemm_sm90_streams({BLOCK_M, BLOCK_N, 1, TURNS}, Operands::kTwoLevels, Epilogue::kRows == 2);

template <typename Operands, int BLOCK_M, int BLOCK_N, bool TURNS, typename Epilogue>
__global__ void __launch_bounds__(GemmSm90ManyRowsThreads<BLOCK_M, BLOCK_N, TURNS, kGemmSm90HasNorm<Operands>>::kBound,
                                  1)
    gemm_sm90_kernel(const __grid_constant__ GemmSm90ArgsWith<typename Epilogue::Params> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Operands::Out;
  using Storage = GemmSm90Storage<Operands, BLOCK_M, BLOCK_N>;
  constexpr bool NORMED = kGemmSm90HasNorm<Operands>;
  using Threads = GemmSm90ManyRowsThreads<BLOCK_M, BLOCK_N, TURNS, NORMED>;
  constexpr bool BESIDE = Threads::kBesideNorms;
  static_assert(!TURNS || Threads::kConsumers == 2);
  constexpr int PANEL = decltype(Storage::ring)::kPanel;
  constexpr int STAGES = Storage::kStages;
  constexpr int HALF_N = BLOCK_N / 2;
  constexpr int NUM_CTAS = 2;  // of a cluster
  constexpr int NUM_WARPS = 4 * Threads::kConsumers;
  constexpr bool OWN_TILES = TURNS && !Operands::kTwoLevels;  // whether a group has tiles for itself
  constexpr int HALVES = OWN_TILES ? 2 : 1;                   // of 64 rows, which a group has of a tile
  constexpr bool STREAMS = kGemmSm90Streams<Operands, BLOCK_M, BLOCK_N, TURNS, Epilogue>;

  Storage& smem = shared_storage<Storage>();
  const typename Epilogue::Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const uint32_t rank = cluster_rank();

  if (threadIdx.x == 0) {
    tma_prefetch_map(args.x);
    tma_prefetch_map(args.weight);
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(NUM_CTAS * NUM_WARPS / HALVES);
    }
    fence_barrier_init();
  }
  __syncwarp();
  cluster_meet();
  grid_dependency_launch();
  if constexpr (!BESIDE) grid_dependency_wait();  // else what wrote x has ended: gemm_row_norms_sm90.cu

  // ---- which tiles
  const int32_t n_tiles = static_cast<int32_t>(p.config.n_tiles);
  const int32_t m_tiles = static_cast<int32_t>(p.config.m_tiles);  // of clusters
  const int32_t num_rows = static_cast<int32_t>(p.m);
  const int32_t cta_rows = p.config.rows;
  const int32_t num_tiles = m_tiles * n_tiles;
  const int32_t cluster = static_cast<int32_t>(blockIdx.x) / NUM_CTAS;
  const int32_t num_clusters = static_cast<int32_t>(gridDim.x) / NUM_CTAS;
  const int32_t num_steps = static_cast<int32_t>((p.k + PANEL - 1) / PANEL);
  const auto walk = GemmSm90Walk::make(num_tiles, num_steps, STREAMS && p.config.stream_k, cluster, num_clusters);
  struct Tile {
    int32_t first_m, first_n;
  };
  const auto tile_of = [&](int32_t idx) {  // this CTA's
    const int32_t group_rows = p.config.group_rows;
    const int32_t group = idx / (group_rows * n_tiles);
    const int32_t in_group = idx - group * group_rows * n_tiles;
    const int32_t rows = min(group_rows, m_tiles - group * group_rows);
    const int32_t column = in_group / rows;
    const int32_t row = group * group_rows + in_group - column * rows;
    return Tile{(row * NUM_CTAS + static_cast<int32_t>(rank)) * cta_rows, column * BLOCK_N};
  };

  RingPosition<STAGES> position;
  if (warp_idx >= NUM_WARPS) {
    // ------------------------------------------------------------------------------- producer
    if constexpr (Threads::kMovesRegisters) give_registers<Threads::kProducerRegisters>();
    if (warp_idx == NUM_WARPS && lane == 0) {
      const uint32_t stage_bytes = static_cast<uint32_t>(cta_rows + BLOCK_N) * kGemmSm90PanelBytes;
      for (int32_t part = 0; part < walk.num_parts; ++part) {
        const Tile tile = tile_of(walk.tile(part));
        for (int32_t step = walk.begin(part); step < walk.end(part); ++step) {
          const uint32_t stage = position.stage();
          const int32_t column = step * PANEL;
          smem.empty[stage].wait(position.parity() ^ 1);
          smem.full[stage].arrive_expect_bytes(stage_bytes);
          tma_load_4d(smem.ring.a[stage][0], args.x, smem.full[stage], column, tile.first_m, 0, 0);
          tma_load_4d_multicast(smem.ring.b[stage][0] + rank * HALF_N * PANEL, args.weight, smem.full[stage], column,
                                tile.first_n + static_cast<int32_t>(rank) * HALF_N, 0, 0, 3);
          position.advance();
        }
      }
    }
    __syncwarp();
  } else {
    // ------------------------------------------------------------------------------ consumers
    if constexpr (Threads::kMovesRegisters) take_registers<Threads::kConsumerRegisters>();
    const int group = warp_idx / 4;
    const GemmSm90Turns<TURNS> turns = {group};
    if (group == 1) turns.end();
    if constexpr (OWN_TILES) position.count = group * num_steps;
    typename Operands::Sum acc[HALVES][BLOCK_N / 8][4];
    const auto release = [&](uint32_t stage) {
      if (lane < NUM_CTAS) smem.empty[stage].arrive_at_cta(lane);
    };
    using Handed = GemmSm90HandedSums<typename Operands::Sum, BLOCK_N / 8>;
    int buffer = 0;
    bool waits = true;
#pragma unroll 1
    for (int32_t part = OWN_TILES ? group : 0; part < walk.num_parts; part += HALVES) {
      const Tile tile = tile_of(walk.tile(part));
      const int32_t begin = walk.begin(part), end = walk.end(part);
      const int32_t first_row = tile.first_m + (OWN_TILES ? 0 : group * 64) + warp_idx % 4 * 16;
      const int32_t end_row = min(tile.first_m + cta_rows, num_rows);
      const bool ends_tile = end == num_steps;
      GemmSm90RowFactors of_rows[HALVES];
      using Added = std::conditional_t<Epilogue::kAdds, GemmSm90AddedRows<T, HALVES, BLOCK_N>, GemmSm90NothingAdded>;
      Added added(p, first_row, end_row, tile.first_n, lane);
      const auto beside_products = [&](uint32_t, int32_t step) {
        if constexpr (BESIDE) {  // soon enough for them to have come when the products end
          if (ends_tile && step == max(end - begin - 4, 0)) {
            if (waits) grid_dependency_wait();
            waits = false;
            load_row_norms(of_rows, p, first_row, lane);
          }
        }
        if constexpr (Epilogue::kAdds) {
          if (ends_tile && step == 0) added.prefetch();
        }
        if constexpr (OWN_TILES) {
          if (step == num_steps - 1) turns.end();  // the other's products queue up behind the last ones
        }
      };
      using Element = typename Operands::Element;
      auto& columns = smem.columns[buffer][group];
      buffer ^= 1;
      if (ends_tile) columns.fetch(p, tile.first_n);

#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        load_row_scales<Operands>(of_rows[half], p, first_row + half * 64, lane);
      }
      if constexpr (NORMED && !BESIDE) load_row_norms(of_rows, p, first_row, lane);
      if constexpr (Operands::kTwoLevels) {
        constexpr int PART_N = BLOCK_N > 128 ? BLOCK_N / 2 : BLOCK_N;
        if constexpr (kGemmSm90HasBlockScales<Operands>) {
          multiply_stages_in_two_levels<Element, BLOCK_N, PART_N>(
              acc[0], smem.ring, smem.full, position, end - begin, group, release, turns,
              GemmSm90ManyRowsScales<BLOCK_N>(p, first_row + lane / 4, tile.first_n, begin));
        } else {
          multiply_stages_in_two_levels<Element, BLOCK_N, PART_N>(acc[0], smem.ring, smem.full, position, end - begin,
                                                                  group, release, turns);
        }
      } else {
        if constexpr (OWN_TILES) turns.take();
        multiply_stages<Element, BLOCK_N>(acc, smem.ring, smem.full, position, end - begin, OWN_TILES ? 0 : group,
                                          release, beside_products, [&] {
                                            if (ends_tile) added.begin();
                                          });
        if constexpr (OWN_TILES) position.count += num_steps;  // the other's
      }
      if constexpr (STREAMS) {
        if (!ends_tile) {
          const Handed handed(p, blockIdx.x, group);
          handed.put(acc[0]);
          handed.hand_on(p.launch_id, kGemmSm90GroupBarrier + group);
          continue;
        }
        if (begin > 0) {
          const int32_t first_step = walk.tile(part) * num_steps;
          int32_t other = cluster;
          do {
            --other;
            const Handed handed(p, other * NUM_CTAS + static_cast<int32_t>(rank), group);
            handed.await(p.launch_id, kGemmSm90GroupBarrier + group);
            handed.template add_to<Threads::kSumsAtOnce>(acc[0]);
          } while (GemmSm90Walk::run_begin(num_tiles * num_steps, other, num_clusters) > first_step);
        }
      }
      columns.arrive(p, kGemmSm90GroupBarrier + group);
      store_rows<BLOCK_N, Epilogue>(acc, columns, of_rows, p, first_row, end_row, tile.first_n, added, lane);
    }
  }
  cluster_meet();  // the other CTA may still write to this one
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Operands, int BLOCK_M, int BLOCK_N, bool TURNS, typename Epilogue>
cudaError_t launch_gemm_sm90(const typename Epilogue::Params& p, cudaStream_t stream) {
  using Storage = GemmSm90Storage<Operands, BLOCK_M, BLOCK_N>;
  GemmSm90ArgsWith<typename Epilogue::Params> args = {p, {}, {}};
  cudaError_t error = make_matrix_map<Operands>(&args.x, p, p.x, p.m, p.x_stride, p.config.rows, true);
  if (error == cudaSuccess) {
    error = make_matrix_map<Operands>(&args.weight, p, p.weight, p.n, p.weight_stride, BLOCK_N / 2, true);
  }
  if (error != cudaSuccess) return error;
  if (p.config.stream_k) args.p.launch_id = new_launch_id();
  return launch_clusters(gemm_sm90_kernel<Operands, BLOCK_M, BLOCK_N, TURNS, Epilogue>, p.config.num_ctas, 2,
                         GemmSm90ManyRowsThreads<BLOCK_M, BLOCK_N, TURNS, kGemmSm90HasNorm<Operands>>::kNum,
                         sizeof(Storage) + 1024, stream, args);
}

// Of an epilogue that adds, with the tile that the call's configuration names.
template <typename Operands, typename Epilogue, size_t TILE_IDX = 0>
cudaError_t launch_gemm_added_sm90_tile(const typename Epilogue::Params& p, cudaStream_t stream) {
  if constexpr (TILE_IDX < std::size(kGemmSm90Tiles)) {
    constexpr GemmSm90Tile kTile = kGemmSm90Tiles[TILE_IDX];
    if constexpr (gemm_sm90_has_tile(kTile, false, false, false, false, true)) {
      const GemmSm90Tile& wanted = p.config.tile;
      if (wanted.block_m == kTile.block_m && wanted.block_n == kTile.block_n && wanted.turns == kTile.turns) {
        return launch_gemm_sm90<Operands, kTile.block_m, kTile.block_n, kTile.turns, Epilogue>(p, stream);
      }
    }
    return launch_gemm_added_sm90_tile<Operands, Epilogue, TILE_IDX + 1>(p, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
