// The Hopper GEMM for a few rows of x: the weight streams by, and takes wgmma's 64 rows; rows of x are the columns.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once; what there is for
//   x (M, K)   weight (N, K)   out (M, N)                  8 bits: gemm_sm90_operands.cuh, of norms: gemm_sm90_norm.cuh
//                                                          of gates: gemm_sm90_epilogue.cuh
//
//                   K of CTA 0    CTA 1     CTA 2     CTA 3        The CTAs of a cluster, config.num_splits of them,
//                 ┌───────────┬─────────┬─────────┬─────────┐      have a run of K each.
//   block_n rows  │ group 0   │         │         │         │
//   of weight     │ group 1   │         │         │         │      a warp:     weight(k), x(k) ─► weight(k+1) ─► …
//                 └───────────┴─────────┴─────────┴─────────┘      groups:     sums (64 x block_m) += weight(k) x(k)^T
//                 ┌───────────┬─────────┬─────────┬─────────┐
//   x (block_m)   └───────────┴─────────┴─────────┴─────────┘
//
//   then          sums to shared memory │ cluster barrier │ each CTA adds up the sums of all, in their order, for its
//                 share of the rows     │ bias, round, store
//
// Drawn for block_n = 128. Of 64 rows both groups have all, and every other panel of K: two parts of a CTA's sums.
//
// In order: one group has all 64 rows and all panels, and no K is split, so that each sum is added up as the kernel for
// many rows does it. What splits would share out is rows of weight instead: a CTA has config.weight_rows of a tile's,
// and what lies in the place of others is multiplied, but goes nowhere. So it is in the other tiles of plain products
// too, where with fewer rows each all CTAs run at once.
//
// Two CTAs an SM where that pays: what one's beginning and end leave of the memory's rate, the other takes. Memory
// serves all that run alike, so that it matters little if some SMs have one and some two.
//
// A weight that is read once is the first to leave the L2 cache: what is there stays, and nothing that was written
// there has to make room by going to memory. Its first stages are asked for, as far as L2, before the kernel in front
// has ended. So that these come when memory would have nothing to do, and not long before they are read, the kernel
// behind may begin once this one's last loads are on their way.
//
// Limits: as in gemm_sm90.cuh.
#pragma once

#include <algorithm>
#include <iterator>

#include "gemm/gemm_sm90_launch.h"
#include "gemm/gemm_sm90_norm.cuh"
#include "gemm/gemm_sm90_sums.cuh"
#include "gemm/gemm_sm90_tiles.cuh"

namespace fastattn {

// What the rows of a tile are multiplied by, and their zero points: here when products have ended.
template <int ROWS, bool ZERO_POINTS>
struct GemmSm90SharedRowScales {
  float scales[ROWS];
  int32_t zero_points[ZERO_POINTS ? ROWS : 1];

  // By so many threads: asks for those of a tile's rows, of which the first is `first`.
  __device__ __forceinline__ void fetch(const GemmSm90Params& p, int32_t first, int32_t num_rows, int num_threads) {
    for (int32_t row = static_cast<int32_t>(threadIdx.x); row < num_rows; row += num_threads) {
      cp_async_4(&scales[row], p.x_scale + (first + row) * p.x_scale_stride, true);
      if constexpr (ZERO_POINTS) {
        if (p.x_zero_point != nullptr) {
          cp_async_4(&zero_points[row], p.x_zero_point + (first + row) * p.x_scale_stride, true);
        }
      }
    }
    cp_async_commit();
  }
  // By address: a store to `out` may change what a pointer points to.
  __device__ __forceinline__ float scale(int32_t row) const {
    return __uint_as_float(load_shared(shared_address(scales + row)));
  }
  __device__ __forceinline__ int32_t zero_point(int32_t row) const {
    return static_cast<int32_t>(load_shared(shared_address(zero_points + row)));
  }
};

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM, typename Epilogue,
          int GROUPS = kGemmSm90Consumers>
struct GemmSm90FewRowsStorage {
  static constexpr GemmSm90FewRowsRing kRing = gemm_sm90_few_rows_ring({BLOCK_M, BLOCK_N, CTAS_PER_SM});
  // Of sums in two levels.
  static constexpr int kPartM = std::min(BLOCK_M, CTAS_PER_SM == 2 ? 32 : 64);

  using Sums = GemmSm90Sums<typename Operands::Sum, BLOCK_M, BLOCK_N, 4 * GROUPS, Epilogue::kRows>;
  // Times eight rows whose moments a warp has.
  static constexpr int kNumEights = std::max(1, BLOCK_M* Sums::kParts / (8 * 4 * GROUPS));
  using Moments = std::conditional_t<Operands::kNorm == GemmSm90Norm::kNone, GemmSm90NoOthers,
                                     GemmSm90SharedMoments<Sums::kParts, BLOCK_M>>;

  using Rows = std::conditional_t<Operands::kScaled, GemmSm90SharedRowScales<BLOCK_M, kGemmSm90HasZeroPoints<Operands>>,
                                  GemmSm90NoOthers>;

  union {
    GemmSm90Ring<typename Operands::Element, BLOCK_N, BLOCK_M, kRing.panels, kRing.num_stages, GROUPS> ring;
    Sums sums;  // when it is no longer needed
  };
  MBarrier full[kRing.num_stages], empty[kRing.num_stages];
  Moments moments;
  Rows rows;
};

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM, typename Epilogue, int GROUPS>
__global__ void __launch_bounds__(128 * GROUPS + 32, CTAS_PER_SM)
    gemm_sm90_few_rows_kernel(const __grid_constant__ GemmSm90ArgsWith<typename Epilogue::Params> args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Operands::Out;
  using Storage = GemmSm90FewRowsStorage<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM, Epilogue, GROUPS>;
  using Ring = decltype(Storage::ring);
  constexpr int STAGES = Ring::kStages;
  constexpr int NUM_WARPS = 4 * GROUPS;
  constexpr bool kNormed = Operands::kNorm != GemmSm90Norm::kNone;
  constexpr bool kCentred = Operands::kNorm == GemmSm90Norm::kLayer;

  Storage& smem = shared_storage<Storage>();
  const typename Epilogue::Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t rank = static_cast<int32_t>(cluster_rank()), num_splits = p.config.num_splits;

  // Clusters that share rows of weight are neighbours.
  const int32_t tile_idx = static_cast<int32_t>(blockIdx.x) / num_splits;
  const int32_t m_tiles = static_cast<int32_t>(p.config.m_tiles);
  const int32_t weight_rows = p.config.weight_rows;
  const int32_t first_n = tile_idx / m_tiles * weight_rows, first_m = tile_idx % m_tiles * p.config.rows;
  const int32_t all_steps = static_cast<int32_t>((p.k + Ring::kStageK - 1) / Ring::kStageK);
  const int32_t begin_step = static_cast<int32_t>(int64_t{rank} * all_steps / num_splits);
  const int32_t end_step = static_cast<int32_t>((int64_t{rank} + 1) * all_steps / num_splits);

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(NUM_WARPS);
    }
    fence_barrier_init();
  }
  __syncthreads();

  constexpr int PER_COLUMN = Epilogue::kRows;
  const int64_t width = p.n / PER_COLUMN;  // of out
  int64_t end_column = 0;
  int32_t column = 0, row = 0;  // the first of a lane's four columns, and of its rows
  const auto find_place = [&] {
    end_column = min(width, int64_t{(first_n + weight_rows) / PER_COLUMN});
    column = first_n / PER_COLUMN + smem.sums.first_column();
    row = smem.sums.first_row(rank);
  };
  // Large tiles leave no registers for what is needed when products have ended: it is found then.
  constexpr bool EARLY = BLOCK_M <= 64 || (BLOCK_M == 128 && CTAS_PER_SM == 1);
  constexpr bool EARLY_PLACE = EARLY || Epilogue::kAdds;
  if constexpr (EARLY_PLACE) find_place();
  // What a lane multiplies the sums of its columns by and adds to them.
  const int32_t num_rows = min(p.config.rows, static_cast<int32_t>(p.m) - first_m);
  float2 bias[PER_COLUMN][2] = {}, scales[PER_COLUMN][2] = {}, weight_sums[PER_COLUMN][2] = {};
  int2 code_sums[PER_COLUMN][2] = {};
  float row_first = 0.0f;
  constexpr bool kStores = Epilogue::kStores;
  std::conditional_t<kStores, Epilogue, GemmSm90NoOthers> of_row;
  const auto load_factors = [&] {
    if (column >= end_column) return;
#pragma unroll
    for (int i = 0; i < PER_COLUMN; ++i) {
      const int32_t weight_row = weight_row_of<Epilogue>(column, i);
      if constexpr (Operands::kScaled) {
        scales[i][0] = weight_scales_of(p, weight_row);
        scales[i][1] = weight_scales_of(p, weight_row + 2);
      }
      if constexpr (kGemmSm90HasZeroPoints<Operands>) {
        if (p.x_zero_point != nullptr) {
          code_sums[i][0] = *reinterpret_cast<const int2*>(p.weight_code_sum + weight_row);
          code_sums[i][1] = *reinterpret_cast<const int2*>(p.weight_code_sum + weight_row + 2);
        }
      }
      if constexpr (kCentred) {
        weight_sums[i][0] = __ldg(reinterpret_cast<const float2*>(p.weight_sum + weight_row));
        weight_sums[i][1] = __ldg(reinterpret_cast<const float2*>(p.weight_sum + weight_row + 2));
      }
      if (p.bias != nullptr) {
        const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const T*>(p.bias) + weight_row);
        bias[i][0] = unpack_pair<T>(pairs.x);
        bias[i][1] = unpack_pair<T>(pairs.y);
      }
    }
    if (kCentred && row < num_rows) row_first = first_of_row<T>(p, first_m + row);
    if constexpr (kStores) {
      if (row < num_rows) of_row.load(p, first_m + row, column);
    }
  };

  const bool given_norms = kNormed && p.row_norms != nullptr;  // gemm_row_norms_sm90.cu: what wrote x has ended

  typename Operands::Sum acc[1][BLOCK_M / 8][4] = {};
  RingPosition<STAGES> position;
  if (warp_idx == NUM_WARPS) {
    // ------------------------------------------------------------------------------- producer
    if (lane == 0) {
      const uint64_t policy = evict_first_policy();
      const uint32_t stage_bytes = Ring::kPanels * kGemmSm90PanelBytes * (weight_rows + p.config.rows);
      const int32_t end_ahead = min(begin_step + STAGES, end_step);
      for (int32_t panel = begin_step * Ring::kPanels; panel < end_ahead * Ring::kPanels; ++panel) {
        tma_prefetch_4d(args.weight, panel * Ring::kPanel, first_n, 0, 0, policy);
      }
      if (!given_norms) grid_dependency_wait();
      for (int32_t step = begin_step; step < end_step; ++step) {
        const uint32_t stage = position.stage();
        smem.empty[stage].wait(position.parity() ^ 1);
        smem.full[stage].arrive_expect_bytes(stage_bytes);
        for (int panel = 0; panel < Ring::kPanels; ++panel) {
          const int32_t column = step * Ring::kStageK + panel * Ring::kPanel;
          if (m_tiles == 1) {
            tma_load_4d(smem.ring.a[stage][panel], args.weight, smem.full[stage], column, first_n, 0, 0, policy);
          } else {
            tma_load_4d(smem.ring.a[stage][panel], args.weight, smem.full[stage], column, first_n, 0, 0);
          }
          tma_load_4d(smem.ring.b[stage][panel], args.x, smem.full[stage], column, first_m, 0, 0);
        }
        position.advance();
      }
    }
    __syncwarp();
    grid_dependency_launch();
  } else {
    // ------------------------------------------------------------------------------ consumers
    if (!given_norms) grid_dependency_wait();
    if constexpr (Operands::kScaled) smem.rows.fetch(p, first_m, num_rows, 128 * GROUPS);
    if constexpr (EARLY) load_factors();  // they are here when products have ended
    if constexpr (Epilogue::kAdds) {      // as far as L2 what other rows of this lane get
      for (int32_t r = row; r < num_rows && column < end_column; r += num_splits * Storage::Sums::kRowsAtOnce) {
        if (!EARLY || r != row) of_row.prefetch(p, first_m + r, column);
      }
    }
    const int group = warp_idx / 4;
    const auto release = [&](uint32_t stage) {
      if (lane == 0) smem.empty[stage].arrive();
    };
    // Of norms, the groups look at the panels that they multiply, or share the rows of the only one.
    constexpr int PARTS = Storage::Sums::kParts;
    constexpr int NUM_EIGHTS = Storage::kNumEights;
    const int part = PARTS == 2 ? group : 0;
    const int first_row = (PARTS == 2 ? warp_idx % 4 : warp_idx) * 8 * NUM_EIGHTS;
    const bool has_rows = first_row < BLOCK_M;
    GemmSm90RowMoments<T, Operands::kNorm, NUM_EIGHTS> moments;
    if constexpr (kNormed) moments.begin(p, first_m + first_row, lane);
    const bool counts = has_rows && !given_norms && (kCentred || p.x_squares == nullptr);
    if constexpr (kNormed && !kCentred) {
      if (has_rows && !given_norms && !counts) {
        moments.take(p, first_m + first_row, lane, rank * PARTS + part, num_splits * PARTS);
      }
    }
    const auto add_moments = [&](uint32_t stage, int32_t step) {
      if constexpr (kNormed) {
        const int32_t first_k = (begin_step + step) * Ring::kStageK + part * Ring::kPanel;
        if (counts) {
          moments.add(smem.ring.b[stage][part] + first_row * Ring::kPanel, static_cast<int32_t>(p.k) - first_k, lane);
        }
      }
    };
    using Element = typename Operands::Element;
    if constexpr (kGemmSm90HasBlockScales<Operands>) {
      constexpr int kApart = GemmSm90Descriptors<Ring>::kPanelsApart;
      const int32_t first_panel = begin_step * Ring::kPanels + (kApart == 2 ? group : 0);
      multiply_stages_in_two_levels<Element, BLOCK_M, Storage::kPartM>(
          acc[0], smem.ring, smem.full, position, end_step - begin_step, group, release, GemmSm90Turns<false>{group},
          GemmSm90FewRowsScales<BLOCK_M, Storage::kPartM>(
              p, first_m, num_rows, first_n + (kApart == 1 ? group * 64 : 0), first_panel, kApart, lane));
    } else if constexpr (Operands::kTwoLevels) {
      multiply_stages_in_two_levels<Element, BLOCK_M, Storage::kPartM>(
          acc[0], smem.ring, smem.full, position, end_step - begin_step, group, release, GemmSm90Turns<false>{group});
    } else {
      multiply_stages<Element, BLOCK_M>(acc, smem.ring, smem.full, position, end_step - begin_step, group, release,
                                        add_moments, [] {});
    }
    if constexpr (kNormed) {
      if (given_norms) {
        grid_dependency_wait();
      } else if (has_rows) {
        moments.finish();
        smem.moments.keep(moments, part, first_row, lane);
      }
    }
    if constexpr (Operands::kScaled) cp_async_wait<0>();
    named_barrier_sync(1, 128 * GROUPS);  // all groups are done with the ring
    smem.sums.keep(acc[0], warp_idx, lane);
  }
  cluster_sync();

  // ---- epilogue: a lane writes four columns
  if constexpr (!EARLY_PLACE) find_place();
  if (warp_idx < NUM_WARPS && (kStores || column < end_column)) {
    if constexpr (!EARLY) load_factors();
    const auto store = [&](int32_t sum_row, auto& sums, const auto& total) {
      [[maybe_unused]] GemmSm90RowNorm norm;
      if constexpr (kNormed) {
        if (given_norms) {
          const float2 given = sum_row < num_rows ? p.row_norms[first_m + sum_row] : float2{};
          norm = {given.x, given.y};
        } else {
          if (kCentred && sum_row != row) row_first = first_of_row<T>(p, first_m + sum_row);
          norm = row_norm_of<Operands::kNorm>(p, total, row_first);
        }
      }
      [[maybe_unused]] float row_scale = 0.0f;
      [[maybe_unused]] int32_t row_zero_point = 0;
      if constexpr (Operands::kScaled) row_scale = smem.rows.scale(sum_row);
      if constexpr (kGemmSm90HasZeroPoints<Operands>) {
        if (p.x_zero_point != nullptr) row_zero_point = smem.rows.zero_point(sum_row);
      }
      float of_columns[4][PER_COLUMN];
#pragma unroll
      for (int i = 0; i < PER_COLUMN; ++i) {
        if constexpr (kGemmSm90HasZeroPoints<Operands>) {
          sums[i].x -= row_zero_point * code_sums[i][0].x;
          sums[i].y -= row_zero_point * code_sums[i][0].y;
          sums[i].z -= row_zero_point * code_sums[i][1].x;
          sums[i].w -= row_zero_point * code_sums[i][1].y;
        }
        float4& value = floats_of(sums[i]);
        if constexpr (kNormed) {
          value.x = (value.x - norm.mean * weight_sums[i][0].x) * norm.scale;
          value.y = (value.y - norm.mean * weight_sums[i][0].y) * norm.scale;
          value.z = (value.z - norm.mean * weight_sums[i][1].x) * norm.scale;
          value.w = (value.w - norm.mean * weight_sums[i][1].y) * norm.scale;
        }
        if constexpr (Operands::kScaled) {
          // Not contracted with the bias: the kernel for many rows cannot.
          value.x = __fmul_rn(value.x, row_scale * scales[i][0].x);
          value.y = __fmul_rn(value.y, row_scale * scales[i][0].y);
          value.z = __fmul_rn(value.z, row_scale * scales[i][1].x);
          value.w = __fmul_rn(value.w, row_scale * scales[i][1].y);
        }
        of_columns[0][i] = value.x + bias[i][0].x;
        of_columns[1][i] = value.y + bias[i][0].y;
        of_columns[2][i] = value.z + bias[i][1].x;
        of_columns[3][i] = value.w + bias[i][1].y;
      }
      float out[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = Epilogue::apply(p, of_columns[i]);
      if constexpr (kStores) {
        const bool is_there = sum_row < num_rows && column < end_column;
        if (is_there && sum_row != row) of_row.load(p, first_m + sum_row, column);
        of_row.template store<T, Storage::Sums::kLanesOfRow>(p, out, first_m + sum_row, column, tile_idx / m_tiles,
                                                             is_there);
      } else {
        *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + (first_m + sum_row) * width + column) =
            make_uint2(pack_pair<T>(out[0], out[1]), pack_pair<T>(out[2], out[3]));
      }
    };
    smem.sums.template add_up<kStores>(num_rows, rank, num_splits, smem.moments, store);
  }
  __syncwarp();
  cluster_meet();  // the others may still read from this CTA
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM, typename Epilogue, int GROUPS>
cudaError_t launch_gemm_sm90_few_rows_of(const typename Epilogue::Params& p, cudaStream_t stream) {
  using Storage = GemmSm90FewRowsStorage<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM, Epilogue, GROUPS>;
  static_assert(sizeof(Storage) <= kGemmSm90SmemBytes / CTAS_PER_SM);
  const GemmSm90Config& config = p.config;
  GemmSm90ArgsWith<typename Epilogue::Params> args = {p, {}, {}};
  cudaError_t error = make_matrix_map<Operands>(&args.x, p, p.x, p.m, p.x_stride, config.rows, false);
  if (error == cudaSuccess) {
    error = make_matrix_map<Operands>(&args.weight, p, p.weight, p.n, p.weight_stride, config.weight_rows, false);
  }
  if (error != cudaSuccess) return error;
  return launch_clusters(gemm_sm90_few_rows_kernel<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM, Epilogue, GROUPS>,
                         config.num_ctas, config.num_splits, 128 * GROUPS + 32, sizeof(Storage) + 1024, stream, args);
}

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM, typename Epilogue>
cudaError_t launch_gemm_sm90_few_rows(const typename Epilogue::Params& p, cudaStream_t stream) {
  return launch_gemm_sm90_few_rows_of<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM, Epilogue, kGemmSm90Consumers>(p, stream);
}

template <typename Operands, int BLOCK_M, int CTAS_PER_SM, typename Epilogue>
cudaError_t launch_gemm_sm90_in_order(const typename Epilogue::Params& p, cudaStream_t stream) {
  return launch_gemm_sm90_few_rows_of<Operands, BLOCK_M, 64, CTAS_PER_SM, Epilogue, 1>(p, stream);
}

// With the tile that the call's configuration names, of those up to MOST_ROWS, for epilogues that only this kernel has.
template <typename Operands, typename Epilogue, int64_t MOST_ROWS = INT64_MAX, size_t TILE_IDX = 0>
cudaError_t launch_gemm_sm90_few_rows_tile(const typename Epilogue::Params& p, cudaStream_t stream) {
  if constexpr (TILE_IDX < std::size(kGemmSm90FewRowsTiles)) {
    constexpr GemmSm90Tile kTile = kGemmSm90FewRowsTiles[TILE_IDX];
    if constexpr (kTile.block_m <= MOST_ROWS) {
      const GemmSm90Tile& wanted = p.config.tile;
      if (p.config.few_rows && wanted.block_m == kTile.block_m && wanted.block_n == kTile.block_n &&
          wanted.ctas_per_sm == kTile.ctas_per_sm) {
        return launch_gemm_sm90_few_rows<Operands, kTile.block_m, kTile.block_n, kTile.ctas_per_sm, Epilogue>(p,
                                                                                                              stream);
      }
    }
    return launch_gemm_sm90_few_rows_tile<Operands, Epilogue, MOST_ROWS, TILE_IDX + 1>(p, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
