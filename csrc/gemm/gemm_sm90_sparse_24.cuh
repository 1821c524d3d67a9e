// The Hopper GEMM for 2:4 sparse weights: half of the weight's bytes, and tensor cores that take half as long.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once; 8 bits: gemm_sm90_operands.cuh
//   x (M, K)   weight (N, K / 2), the elements stored, and metadata, which of four they are: arch/wgmma_sparse.cuh
//
// wgmma's sparse operand is the left one, so that rows of weight are its 64 rows, for many rows of x too:
//
//                         x tile (block_m rows), a share of it
//                         loaded by each CTA of a cluster, for both
//                        ┌───────────────────────────────────┐
//              ┌─────┐   │                                   │
//   cluster    │  w  │   │ group 0: 64 x block_m             │   CTA 0       a stage:  weight   128 x row_bytes
//   of two:    │ 128 │   │ group 1: 64 x block_m             │                         metadata 256 threads x words
//   256 rows   ├─────┤   ├───────────────────────────────────┤                         x        block_m x 2 row_bytes
//   of weight  │  w  │   │ group 0                           │   CTA 1
//              │ 128 │   │ group 1                           │
//              └─────┘   └───────────────────────────────────┘
//
//   a warp               weight(k), metadata(k), shares of x(k) ─► the same of k+1 ─► … from one tile on to the next
//   group 0              k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//   group 1              k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//
// Drawn for 128 and 256 rows of x. Tiles of 16 and 64 have clusters of one CTA. A weight that is read once is the first
// to leave the L2 cache.
//
// With config.stream_k the stages of all tiles are shared out (gemm_sm90_stream_k.cuh), so that each CTA reads as much,
// whatever N is. How rows of out leave: gemm_sm90_transposed_rows.cuh.
//
// Limits: 16-byte aligned rows of x and of the stored weight, N a multiple of 8. Rows past N and columns past K are
// zeros in shared memory; where rows of x are not there lies what was there before, which is multiplied, but not
// stored.
#pragma once

#include <algorithm>

#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/launch_id.h"
#include "arch/registers.cuh"
#include "arch/tensor_map.h"
#include "arch/tma.cuh"
#include "arch/wgmma_sparse.cuh"
#include "gemm/gemm_sm90_operands.cuh"
#include "gemm/gemm_sm90_sparse_24.h"
#include "gemm/gemm_sm90_stream_k.cuh"
#include "gemm/gemm_sm90_transposed_rows.cuh"

namespace fastattn {

struct GemmSm90SparseArgs {
  GemmSm90SparseParams p;
  CUtensorMap x, weight;
};

constexpr int kGemmSm90SparseThreads = 128 * (kGemmSm90StreamKGroups + 1);  // two groups, and one of which a warp loads
constexpr int kGemmSm90SparseConsumerRegisters = 232, kGemmSm90SparseProducerRegisters = 40;

template <typename Operands, int BLOCK_M>
struct GemmSm90SparseStorage {
  using Element = typename Operands::Element;
  using Rows = GemmSm90TransposedRows<typename Operands::Out, BLOCK_M, Operands::kScaled, std::min(BLOCK_M, 32)>;
  static constexpr int kNumCtas = gemm_sm90_sparse_sharing(BLOCK_M);  // of a cluster
  static constexpr int kRowBytes = gemm_sm90_sparse_row_bytes(BLOCK_M);
  static constexpr int kPanelBytes = std::min(kRowBytes, 128), kPanels = kRowBytes / kPanelBytes;  // of weight
  static constexpr int kColumns = 2 * kRowBytes / static_cast<int>(sizeof(Element));
  static constexpr int kXPanels = 2 * kRowBytes / 128;
  static constexpr int kWords = kColumns / kGemmSm90SparseUnitK;  // of metadata of a thread
  static_assert(kGemmSm90SparsePaddedK % kColumns == 0);
  static constexpr int kPartM = std::min(BLOCK_M, 64);  // of sums in two levels

  static constexpr uint32_t kWeightBytes = kGemmSm90SparseN * kRowBytes, kMetadataBytes = kWords * 256 * 4;
  static constexpr uint32_t kWeightPanelBytes = kGemmSm90SparseN * kPanelBytes, kXPanelBytes = BLOCK_M * 128;
  static constexpr uint32_t kXBytes = kXPanels * kXPanelBytes;
  static constexpr int kSmemBytes = 227 * 1024 - 1024;  // of a CTA; the rest is spent on alignment
  static constexpr int kStages =
      (kSmemBytes - 2 * sizeof(Rows)) / (kWeightBytes + kMetadataBytes + kXBytes + 2 * sizeof(MBarrier));
  static_assert(kStages >= 3, "a stage is released while the next one is computed");

  alignas(1024) unsigned char weight[kStages][kWeightBytes];
  alignas(1024) unsigned char x[kStages][kXBytes];
  alignas(128) uint32_t metadata[kStages][kWords][256];
  Rows rows[2];
  MBarrier full[kStages], empty[kStages];
};

// The products of a group with one stage: 32 bytes of stored rows of weight each, and 64 of rows of x.
template <typename Operands, int BLOCK_M>
struct GemmSm90SparseProducts {
  using Storage = GemmSm90SparseStorage<Operands, BLOCK_M>;
  using Element = typename Operands::Element;
  using Metadata = uint32_t[Storage::kWords];
  static constexpr int kProducts = Storage::kRowBytes / 32;
  WgmmaDescriptor weight, x;

  __device__ __forceinline__ GemmSm90SparseProducts(const Storage& smem, uint32_t stage, int group, Metadata& metadata)
      : weight(WgmmaDescriptor::make<Storage::kPanelBytes>(smem.weight[0], 0)
                   .uniform_plus(stage * Storage::kWeightBytes + group * 64 * Storage::kPanelBytes)),
        x(WgmmaDescriptor::make<128>(smem.x[0], 0).uniform_plus(stage * Storage::kXBytes)) {
#pragma unroll
    for (int i = 0; i < Storage::kWords; ++i) {
      metadata[i] = load_shared(shared_address(&smem.metadata[stage][i][threadIdx.x]));
    }
  }

  // Of two, which of 16 bits have one word of metadata, and of so many rows of x.
  template <int ROWS, typename Sum>
  __device__ __forceinline__ void start_two(Sum (&acc)[ROWS / 8][4], const Metadata& metadata, int first, int first_row,
                                            bool accumulate) const {
    constexpr bool kSharesWord = sizeof(Element) == 2;
    const uint32_t x_offset = first / 2 * Storage::kXPanelBytes + first_row * 128;
    const uint32_t weight_offset =
        first * 32 / Storage::kPanelBytes * Storage::kWeightPanelBytes + first * 32 % Storage::kPanelBytes;
    using Product = SparseWgmma<Element, ROWS>;
    Product::template ss<0>(acc, weight.plus(weight_offset), x.plus(x_offset),
                            metadata[kSharesWord ? first / 2 : first], accumulate);
    Product::template ss<kSharesWord>(acc, weight.plus(weight_offset + 32), x.plus(x_offset + 64),
                                      metadata[kSharesWord ? first / 2 : first + 1], 1);
  }
};

// acc (64, BLOCK_M) of a group over so many stages, one at least. A stage is released when the products of the next one
// have been issued: the tensor cores always have some at hand. Metadata of two stages are in registers, in turns.
template <typename Operands, int BLOCK_M, typename Release>
__device__ __forceinline__ void multiply_sparse_stages(
    typename Operands::Sum (&acc)[BLOCK_M / 8][4], GemmSm90SparseStorage<Operands, BLOCK_M>& smem,
    RingPosition<GemmSm90SparseStorage<Operands, BLOCK_M>::kStages>& position, int32_t num_stages, int group,
    Release release) {
  using Products = GemmSm90SparseProducts<Operands, BLOCK_M>;
  typename Products::Metadata metadata[2];
  uint32_t before = 0;
#pragma unroll 1
  for (int32_t first = 0; first < num_stages; first += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first + i == num_stages) break;
      const uint32_t stage = position.stage();
      smem.full[stage].wait(position.parity());
      const Products products(smem, stage, group, metadata[i]);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < Products::kProducts; j += 2) {
        products.template start_two<BLOCK_M>(acc, metadata[i], j, 0, first + i + j > 0);
      }
      wgmma_commit();
      if (first + i > 0) {
        wgmma_wait<1>();
        pin_metadata(metadata[1 - i]);
        release(before);
      }
      before = stage;
      position.advance();
    }
  }
  wgmma_wait<0>();
  pin_metadata(metadata[0]);
  pin_metadata(metadata[1]);
  pin_registers(acc);
  release(before);
}

// The same in two levels, for fp8 (gemm_sm90_operands.cuh): the tensor cores add up four products, registers the rest.
template <typename Operands, int BLOCK_M, typename Release>
__device__ __forceinline__ void multiply_sparse_stages_in_two_levels(
    float (&acc)[BLOCK_M / 8][4], GemmSm90SparseStorage<Operands, BLOCK_M>& smem,
    RingPosition<GemmSm90SparseStorage<Operands, BLOCK_M>::kStages>& position, int32_t num_stages, int group,
    Release release) {
  using Products = GemmSm90SparseProducts<Operands, BLOCK_M>;
  static_assert(Products::kProducts % 4 == 0);
  constexpr int PART_M = GemmSm90SparseStorage<Operands, BLOCK_M>::kPartM;
#pragma unroll
  for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[t][i] = 0.0f;
  }
  float part[PART_M / 8][4];
  typename Products::Metadata metadata;
#pragma unroll 1
  for (int32_t i = 0; i < num_stages; ++i) {
    const uint32_t stage = position.stage();
    smem.full[stage].wait(position.parity());
    const Products products(smem, stage, group, metadata);
#pragma unroll
    for (int j = 0; j < Products::kProducts; j += 4) {
#pragma unroll
      for (int row = 0; row < BLOCK_M; row += PART_M) {
        wgmma_fence();
        products.template start_two<PART_M>(part, metadata, j, row, false);
        products.template start_two<PART_M>(part, metadata, j + 2, row, true);
        wgmma_commit();
        wgmma_wait<0>();
        pin_metadata(metadata);
        pin_registers(part);
        if (j + 4 == Products::kProducts && row + PART_M == BLOCK_M) release(stage);
#pragma unroll
        for (int t = 0; t < PART_M / 8; ++t) {
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[row / 8 + t][k] += part[t][k];
        }
      }
    }
    position.advance();
  }
}

template <typename Operands, int BLOCK_M>
__global__ void __launch_bounds__(kGemmSm90SparseThreads, 1)
    gemm_sm90_sparse_kernel(const __grid_constant__ GemmSm90SparseArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Operands::Out;
  using Sum = typename Operands::Sum;
  using Storage = GemmSm90SparseStorage<Operands, BLOCK_M>;
  using Handed = GemmSm90HandedSums<Sum, BLOCK_M / 8>;
  constexpr int STAGES = Storage::kStages;
  constexpr int NUM_CTAS = Storage::kNumCtas;
  constexpr int NUM_WARPS = 4 * kGemmSm90StreamKGroups;

  Storage& smem = shared_storage<Storage>();
  const GemmSm90SparseParams& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t rank = NUM_CTAS == 1 ? 0 : static_cast<int32_t>(cluster_rank());

  if (threadIdx.x == 0) {
    tma_prefetch_map(args.x);
    tma_prefetch_map(args.weight);
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(NUM_CTAS * NUM_WARPS);
    }
    fence_barrier_init();
  }
  if constexpr (NUM_CTAS == 1) {
    __syncthreads();
  } else {
    __syncwarp();
    cluster_meet();
  }
  grid_dependency_launch();

  // ---- which tiles
  const int32_t m_tiles = static_cast<int32_t>(p.config.m_tiles);
  const int32_t n_tiles = static_cast<int32_t>(p.config.n_tiles);  // of clusters
  const int32_t num_tiles = m_tiles * n_tiles;
  const int32_t cluster = static_cast<int32_t>(blockIdx.x) / NUM_CTAS;
  const int32_t num_clusters = static_cast<int32_t>(gridDim.x) / NUM_CTAS;
  const int32_t num_stages = (static_cast<int32_t>(p.k) - 1) / Storage::kColumns + 1;
  const auto walk = GemmSm90Walk::make(num_tiles, num_stages, p.config.stream_k, cluster, num_clusters);
  struct Tile {
    int32_t first_m, first_n;
  };
  const auto tile_of = [&](int32_t idx) {
    const int32_t group_rows = p.config.group_rows;
    const int32_t group = idx / (group_rows * n_tiles);
    const int32_t in_group = idx - group * group_rows * n_tiles;
    const int32_t rows = min(group_rows, m_tiles - group * group_rows);
    const int32_t column = in_group / rows;
    const int32_t row = group * group_rows + in_group - column * rows;
    return Tile{row * p.config.rows, (column * NUM_CTAS + rank) * kGemmSm90SparseN};
  };

  RingPosition<STAGES> position;
  if (warp_idx >= NUM_WARPS) {
    // ------------------------------------------------------------------------------- producer
    give_registers<kGemmSm90SparseProducerRegisters>();
    if (warp_idx == NUM_WARPS && lane == 0) {
      constexpr int PANEL = Storage::kPanelBytes / sizeof(typename Operands::Element);  // of stored weight
      constexpr int X_PANEL = 128 / sizeof(typename Operands::Element);
      constexpr int64_t UNIT_WORDS = 256;
      const uint64_t policy = evict_first_policy();
      const int32_t share = p.config.rows / NUM_CTAS;  // of a tile's rows of x
      const uint32_t stage_bytes = Storage::kWeightBytes + Storage::kMetadataBytes +
                                   static_cast<uint32_t>(p.config.rows) * 128 * Storage::kXPanels;
      const int64_t units =
          (p.k + kGemmSm90SparsePaddedK - 1) / kGemmSm90SparsePaddedK * (kGemmSm90SparsePaddedK / kGemmSm90SparseUnitK);
      if (m_tiles == 1) {  // as far as L2, before the kernel in front has ended
        const Tile tile = tile_of(walk.tile(0));
        for (int32_t step = walk.begin(0); step < min(walk.begin(0) + STAGES, walk.end(0)); ++step) {
          for (int panel = 0; panel < Storage::kPanels; ++panel) {
            tma_prefetch_4d(args.weight, (step * Storage::kPanels + panel) * PANEL, tile.first_n, 0, 0, policy);
          }
        }
      }
      grid_dependency_wait();
      for (int32_t part = 0; part < walk.num_parts; ++part) {
        const Tile tile = tile_of(walk.tile(part));
        const int64_t first_unit = tile.first_n / kGemmSm90SparseN * units;
        for (int32_t step = walk.begin(part); step < walk.end(part); ++step) {
          const uint32_t stage = position.stage();
          MBarrier& full = smem.full[stage];
          smem.empty[stage].wait(position.parity() ^ 1);
          full.arrive_expect_bytes(stage_bytes);
          for (int panel = 0; panel < Storage::kPanels; ++panel) {
            unsigned char* const target = smem.weight[stage] + panel * Storage::kWeightPanelBytes;
            const int32_t column = (step * Storage::kPanels + panel) * PANEL;
            if (m_tiles == 1) {
              tma_load_4d(target, args.weight, full, column, tile.first_n, 0, 0, policy);
            } else {
              tma_load_4d(target, args.weight, full, column, tile.first_n, 0, 0);
            }
          }
          // The second CTA's rows may all lie behind N, and with them metadata.
          const int64_t unit = first_unit + step * Storage::kWords;
          tma_load_bytes(smem.metadata[stage], p.metadata + (tile.first_n < p.n ? unit : 0) * UNIT_WORDS, full,
                         Storage::kMetadataBytes);
          for (int panel = 0; panel < Storage::kXPanels; ++panel) {
            unsigned char* const target = smem.x[stage] + panel * Storage::kXPanelBytes + rank * share * 128;
            const int32_t column = (step * Storage::kXPanels + panel) * X_PANEL, row = tile.first_m + rank * share;
            if constexpr (NUM_CTAS == 1) {
              tma_load_4d(target, args.x, full, column, row, 0, 0);
            } else {
              tma_load_4d_multicast(target, args.x, full, column, row, 0, 0, 3);
            }
          }
          position.advance();
        }
      }
    }
    __syncwarp();
  } else {
    // ------------------------------------------------------------------------------ consumers
    take_registers<kGemmSm90SparseConsumerRegisters>();
    grid_dependency_wait();
    const int group = warp_idx / 4;
    const int32_t n_of_lane = warp_idx * 16 + lane / 4;  // of a tile, and the one 8 below
    const auto release = [&](uint32_t stage) {
      if constexpr (NUM_CTAS == 1) {
        if (lane == 0) smem.empty[stage].arrive();
      } else {
        if (lane < NUM_CTAS) smem.empty[stage].arrive_at_cta(lane);
      }
    };
    Sum acc[BLOCK_M / 8][4];
#pragma unroll 1
    for (int32_t part = 0; part < walk.num_parts; ++part) {
      const Tile tile = tile_of(walk.tile(part));
      const int32_t begin = walk.begin(part), end = walk.end(part);
      const int32_t end_m = min(tile.first_m + p.config.rows, static_cast<int32_t>(p.m));
      float factors[2] = {1.0f, 1.0f}, bias[2] = {};
      typename Storage::Rows::OwnScales x_scales;
      if constexpr (Operands::kScaled) {
        Storage::Rows::fetch(x_scales, tile.first_m, end_m, [&](int64_t row) { return Operands::row_scale(p, row); });
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t row = min(tile.first_n + n_of_lane + i * 8, static_cast<int32_t>(p.n) - 1);
        if constexpr (Operands::kScaled) factors[i] = __ldg(p.weight_scale + row * p.weight_scale_stride);
        if (p.bias != nullptr) bias[i] = to_float(static_cast<const T*>(p.bias)[row]);
      }
      if constexpr (Operands::kTwoLevels) {
        multiply_sparse_stages_in_two_levels<Operands, BLOCK_M>(acc, smem, position, end - begin, group, release);
      } else {
        multiply_sparse_stages<Operands, BLOCK_M>(acc, smem, position, end - begin, group, release);
      }
      const int barrier = 1 + group;
      if (end < num_stages) {
        const Handed handed(p, blockIdx.x, group);
        handed.put(acc);
        handed.hand_on(p.launch_id, barrier);
        continue;
      }
      if (begin > 0) {
        const int32_t all_stages = num_tiles * num_stages, first_stage = walk.tile(part) * num_stages;
        int32_t first = cluster - 1;
        while (GemmSm90Walk::run_begin(all_stages, first, num_clusters) > first_stage) --first;
        Handed::await_all(p, first * NUM_CTAS + rank, NUM_CTAS, cluster - first, group, barrier);
#pragma unroll 1
        for (int32_t other = cluster - 1; other >= first; --other) {
          Handed(p, other * NUM_CTAS + rank, group).add_to(acc);
        }
      }
      smem.rows[group].store(acc, x_scales, factors, bias, static_cast<T*>(p.out), p.n, tile.first_m, end_m,
                             tile.first_n + group * 64, barrier);
    }
  }
  if constexpr (NUM_CTAS > 1) cluster_meet();  // the other CTA may still write to this one
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Operands, int BLOCK_M>
cudaError_t launch_gemm_sm90_sparse(const GemmSm90SparseParams& p, cudaStream_t stream) {
  using Storage = GemmSm90SparseStorage<Operands, BLOCK_M>;
  static_assert(sizeof(Storage) <= Storage::kSmemBytes);
  constexpr int kElementBytes = sizeof(typename Operands::Element);
  constexpr int kNumCtas = Storage::kNumCtas;
  GemmSm90SparseArgs args = {p, {}, {}};
  cudaError_t error = make_tensor_map(&args.x, {p.x,
                                                Operands::kDType,
                                                {p.k, p.m, 1, 1},
                                                {p.x_stride, 0, 0},
                                                128 / kElementBytes,
                                                p.config.rows / kNumCtas,
                                                kNumCtas > 1});
  if (error == cudaSuccess) {
    error = make_tensor_map(&args.weight, {p.weight,
                                           Operands::kDType,
                                           {p.k / 2, p.n, 1, 1},
                                           {p.weight_stride, 0, 0},
                                           Storage::kPanelBytes / kElementBytes,
                                           kGemmSm90SparseN,
                                           kNumCtas > 1});
  }
  if (error != cudaSuccess) return error;
  if (p.config.stream_k) args.p.launch_id = new_launch_id();
  return launch_clusters(gemm_sm90_sparse_kernel<Operands, BLOCK_M>, p.config.num_ctas, kNumCtas,
                         kGemmSm90SparseThreads, sizeof(Storage) + 1024, stream, args);
}

// Which exist, for every kind: add a case here and a tile in gemm_sm90_sparse_24_config.h. Few rows wait for memory,
// and may have other sums.
template <typename Operands, typename FewRowsOperands = Operands>
cudaError_t run_gemm_sm90_sparse(const GemmSm90SparseParams& p, cudaStream_t stream) {
  switch (p.config.tile.block_m) {
    case 16:
      return launch_gemm_sm90_sparse<FewRowsOperands, 16>(p, stream);
    case 64:
      return launch_gemm_sm90_sparse<FewRowsOperands, 64>(p, stream);
    case 128:
      return launch_gemm_sm90_sparse<Operands, 128>(p, stream);
    case 256:
      if constexpr (!Operands::kTwoLevels) return launch_gemm_sm90_sparse<Operands, 256>(p, stream);
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
