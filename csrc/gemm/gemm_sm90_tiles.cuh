// What the Hopper GEMMs share: tiles in shared memory, a consumer's walk over K, how rows leave for memory, and the
// tensors' maps.
#pragma once

#include <algorithm>

#include "arch/cp_async.cuh"
#include "arch/fragments.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/registers.cuh"
#include "arch/tensor_map.h"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "gemm/gemm_sm90.h"
#include "gemm/gemm_sm90_added_rows.cuh"
#include "gemm/gemm_sm90_block_scales.cuh"
#include "gemm/gemm_sm90_epilogue.cuh"
#include "gemm/gemm_sm90_operands.cuh"

namespace fastattn {

template <typename Params>
struct GemmSm90ArgsWith {
  Params p;
  CUtensorMap x, weight;
};
using GemmSm90Args = GemmSm90ArgsWith<GemmSm90Params>;

constexpr int kGemmSm90Consumers = 2;                            // warp groups, but for many rows in tiles of 192
constexpr int kGemmSm90Threads = 128 * kGemmSm90Consumers + 32;  // and a warp that loads
constexpr int kGemmSm90PanelBytes = 128;                         // of a row, columns of K that lie together
constexpr int kGemmSm90SmemBytes = 227 * 1024 - 1024;            // of a CTA; the rest is spent on alignment

// Barriers of the SM; 0 is __syncthreads'. Of consumers, the first of neighbours each.
enum GemmSm90Barrier { kGemmSm90GroupBarrier = 1, kGemmSm90TurnBarrier = 4 };

// Whose products the tensor cores get: a group takes a turn when the other one has ended its own. To begin with, group
// 1 ends one. Without TURNS, whoever comes.
template <bool TURNS>
struct GemmSm90Turns {
  int group;
  __device__ __forceinline__ void take() const {
    if constexpr (TURNS) named_barrier_sync(kGemmSm90TurnBarrier + group, 128 * kGemmSm90Consumers);
  }
  __device__ __forceinline__ void end() const {
    if constexpr (TURNS) named_barrier_arrive(kGemmSm90TurnBarrier + 1 - group, 128 * kGemmSm90Consumers);
  }
};

// A ring of stages, each PANELS panels of A_ROWS rows of the operand that fills wgmma's 64 rows, and of B_ROWS of the
// other. Of 64 rows for two groups each of these takes every other panel.
template <typename T, int A_ROWS, int B_ROWS, int PANELS, int STAGES, int GROUPS = A_ROWS == 64 ? 2 : A_ROWS / 64>
struct GemmSm90Ring {
  static_assert(STAGES >= 2, "a stage is released while the next one is computed");
  static constexpr int kPanelsApart = 64 * GROUPS / A_ROWS;  // of a group's
  static constexpr int kRowsA = A_ROWS, kPanels = PANELS, kStages = STAGES;
  static constexpr int kPanel = kGemmSm90PanelBytes / sizeof(T), kStageK = PANELS * kPanel;  // columns
  static constexpr uint32_t kBytesA = A_ROWS * kStageK * sizeof(T), kBytesB = B_ROWS * kStageK * sizeof(T);

  alignas(1024) T a[STAGES][PANELS][A_ROWS * kPanel];
  alignas(1024) T b[STAGES][PANELS][B_ROWS * kPanel];
};

// Of a tile's columns in the kernels for many rows, which lie at `first` and on.
template <typename Operands, int BLOCK_N>
struct GemmSm90Columns {
  using T = typename Operands::Out;
  static constexpr bool kHasFactors = Operands::kScaled || Operands::kNorm == GemmSm90Norm::kLayer;
  static constexpr bool kHasCodeSums = kGemmSm90HasZeroPoints<Operands> && gemm_sm90_has_zero_points(BLOCK_N);
  float factors[kHasFactors ? BLOCK_N * (kHasCodeSums ? 2 : 1) : 1];  // and the bits of code sums
  uint32_t bias[BLOCK_N / 2];                                         // pairs

  // By the 128 threads of a group: asks for them.
  template <typename Params>
  __device__ __forceinline__ void fetch(const Params& p, int32_t first) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x) % 128;
    if constexpr (kHasFactors) {
      const float* const source = Operands::column_factors(p);
      if (source != nullptr) {
#pragma unroll
        for (int32_t i = thread; i < BLOCK_N; i += 128) {
          const bool inside = first + i < p.n;
          cp_async_4(&factors[i], source + (inside ? (first + i) * Operands::column_stride(p) : 0), inside);
        }
      }
    }
    if constexpr (kHasCodeSums) {
      if (p.x_zero_point != nullptr) {
#pragma unroll
        for (int32_t i = thread; i < BLOCK_N; i += 128) {
          const bool inside = first + i < p.n;
          cp_async_4(&factors[BLOCK_N + i], p.weight_code_sum + (inside ? first + i : 0), inside);
        }
      }
    }
    if (p.bias != nullptr && thread < BLOCK_N / 2) {
      const bool inside = first + 2 * thread < p.n;
      cp_async_4(&bias[thread], static_cast<const uint32_t*>(p.bias) + (inside ? first / 2 + thread : 0), inside);
    }
    cp_async_commit();
  }

  // By the same: until what they have asked for is here, and nobody reads that of the tile before.
  template <typename Params>
  __device__ __forceinline__ void arrive(const Params& p, int barrier) {
    cp_async_wait<0>();
    if constexpr (kHasFactors) {
#pragma unroll
      for (int32_t i = static_cast<int32_t>(threadIdx.x) % 128; i < BLOCK_N; i += 128) {
        factors[i] = Operands::column_factor(p, factors[i]);
      }
    }
    named_barrier_sync(barrier, 128);
  }
};

// What a CTA of theirs has in shared memory. A group computes 64 of its rows.
template <typename Operands, int BLOCK_M, int BLOCK_N>
struct GemmSm90Storage {
  static constexpr int kConsumers = BLOCK_M / 64;
  using Columns = GemmSm90Columns<Operands, BLOCK_N>;
  static constexpr int kColumnsBytes = 2 * kConsumers * sizeof(Columns);
  // Beside a norm's kernel, whose CTAs have none but what each CTA has.
  static constexpr int kBytes = kGemmSm90SmemBytes - (kGemmSm90HasNorm<Operands> ? 1024 : 0);
  static constexpr int kStages =
      std::min<int>(8, (kBytes - kColumnsBytes) / ((BLOCK_M + BLOCK_N) * kGemmSm90PanelBytes + 2 * sizeof(MBarrier)));

  GemmSm90Ring<typename Operands::Element, BLOCK_M, BLOCK_N, 1, kStages, kConsumers> ring;
  Columns columns[2][kConsumers];  // of this tile and the next, by group
  MBarrier full[kStages], empty[kStages];
};

// Where a group finds its operands in the first stage.
template <typename Ring>
struct GemmSm90Descriptors {
  static constexpr int kPanelsApart = Ring::kPanelsApart;
  static constexpr uint32_t kPanelBytesA = Ring::kBytesA / Ring::kPanels, kPanelBytesB = Ring::kBytesB / Ring::kPanels;
  WgmmaDescriptor a, b;

  __device__ __forceinline__ GemmSm90Descriptors(const Ring& ring, int group)
      : a(WgmmaDescriptor::make<128>(ring.a[0][0], 0).uniform_plus(group * 64 * kGemmSm90PanelBytes)),
        b(WgmmaDescriptor::make<128>(ring.b[0][0], 0).uniform_plus(kPanelsApart == 2 ? group * kPanelBytesB : 0)) {}
};

// The sums of ROWS of B's rows.
template <int ROWS, int NUM_TILES, typename Sum>
__device__ __forceinline__ auto part_of(Sum (&acc)[NUM_TILES][4], int row) -> Sum (&)[ROWS / 8][4] {
  return reinterpret_cast<Sum(&)[ROWS / 8][4]>(acc[row / 8]);
}

// acc (64 HALVES, B_ROWS) = A B^T over so many stages, one at least. A consumer takes rows 64 `group` and on of A;
// where there are 64 only, every other panel of them, and two consumers have to add up what they get. A stage is
// released when the products of the next one have been issued: the tensor cores always have some at hand.
// look_at(stage, i): what else is to be done with stage i, while its products run. before_last: when nothing is left
// to do but to wait for the last ones.
template <typename T, int B_ROWS, int HALVES, typename Sum, typename Ring, typename Release, typename LookAt,
          typename BeforeLast>
__device__ __forceinline__ void multiply_stages(Sum (&acc)[HALVES][B_ROWS / 8][4], const Ring& ring, MBarrier* full,
                                                RingPosition<Ring::kStages>& position, int32_t num_stages, int group,
                                                Release release, LookAt look_at, BeforeLast before_last) {
  using Descriptors = GemmSm90Descriptors<Ring>;
  constexpr int PART_ROWS = Ring::kRowsA > 128 && B_ROWS > 192 ? B_ROWS / 2 : B_ROWS;
  const Descriptors first(ring, group);
  uint32_t before = 0;
#pragma unroll 1
  for (int32_t i = 0; i < num_stages; ++i) {
    const uint32_t stage = position.stage();
    full[stage].wait(position.parity());
    const WgmmaDescriptor stage_a = first.a.uniform_plus(stage * Ring::kBytesA);
    const WgmmaDescriptor stage_b = first.b.uniform_plus(stage * Ring::kBytesB);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < Ring::kPanels; panel += Descriptors::kPanelsApart) {
#pragma unroll
      for (int bytes = 0; bytes < kGemmSm90PanelBytes; bytes += 32) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half) {
          const int offset_a = panel * Descriptors::kPanelBytesA + half * 64 * kGemmSm90PanelBytes + bytes;
#pragma unroll
          for (int row = 0; row < B_ROWS; row += PART_ROWS) {
            Wgmma<T, PART_ROWS>::ss(part_of<PART_ROWS>(acc[half], row), stage_a.plus(offset_a),
                                    stage_b.plus(panel * Descriptors::kPanelBytesB + row * kGemmSm90PanelBytes + bytes),
                                    i > 0 || panel > 0 || bytes > 0);
          }
        }
      }
    }
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      release(before);
    }
    look_at(stage, i);
    before = stage;
    position.advance();
  }
  before_last();
  wgmma_wait<0>();
#pragma unroll
  for (int half = 0; half < HALVES; ++half) pin_registers(acc[half]);
  release(before);
}

// The same in two levels, for fp8: the tensor cores keep about 14 bits of a sum, so that they add up no more than a
// panel, and registers the panels in fp32. They do so for PART_ROWS of B at a time, for want of registers; meanwhile
// the other group's products run. With turns, which are of a part each, they surely do: groups whose products run at
// the same time also add at the same time. With scales a panel's sums are multiplied by them on the way.
template <typename T, int B_ROWS, int PART_ROWS, bool TURNS, typename Ring, typename Release,
          typename Scales = GemmSm90NoScales>
__device__ __forceinline__ void multiply_stages_in_two_levels(float (&acc)[B_ROWS / 8][4], const Ring& ring,
                                                              MBarrier* full, RingPosition<Ring::kStages>& position,
                                                              int32_t num_stages, int group, Release release,
                                                              const GemmSm90Turns<TURNS>& turns, Scales scales = {}) {
  static_assert(B_ROWS % PART_ROWS == 0);
  using Descriptors = GemmSm90Descriptors<Ring>;
  const Descriptors first(ring, group);
#pragma unroll
  for (int tile = 0; tile < B_ROWS / 8; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[tile][i] = 0.0f;
  }
  float part[PART_ROWS / 8][4];
#pragma unroll 1
  for (int32_t i = 0; i < num_stages; ++i) {
    const uint32_t stage = position.stage();
    scales.ask(0);
    full[stage].wait(position.parity());
    const WgmmaDescriptor stage_a = first.a.uniform_plus(stage * Ring::kBytesA);
    const WgmmaDescriptor stage_b = first.b.uniform_plus(stage * Ring::kBytesB);
#pragma unroll
    for (int panel = 0; panel < Ring::kPanels; panel += Descriptors::kPanelsApart) {
#pragma unroll
      for (int row = 0; row < B_ROWS; row += PART_ROWS) {
        if (panel > 0 || row > 0) scales.ask(row);
        turns.take();
        wgmma_fence();
#pragma unroll
        for (int bytes = 0; bytes < kGemmSm90PanelBytes; bytes += 32) {
          Wgmma<T, PART_ROWS>::ss(part, stage_a.plus(panel * Descriptors::kPanelBytesA + bytes),
                                  stage_b.plus(panel * Descriptors::kPanelBytesB + row * kGemmSm90PanelBytes + bytes),
                                  bytes > 0);
        }
        wgmma_commit();
        turns.end();
        wgmma_wait<0>();
        pin_registers(part);
        if (panel + Descriptors::kPanelsApart >= Ring::kPanels && row + PART_ROWS == B_ROWS) release(stage);
        if (row + PART_ROWS == B_ROWS) {
          scales.template take<PART_ROWS, true>(row);
        } else {
          scales.template take<PART_ROWS, false>(row);
        }
        scales.add(part_of<PART_ROWS>(acc, row), part);
      }
    }
    position.advance();
  }
}

// What becomes of the sums of a lane's two rows, 8 apart, of a warp's 16: (sum - mean * column's factor) * scale with a
// norm, else sum * scale * column's factor.
struct GemmSm90RowFactors {
  float scale[2] = {}, mean[2] = {};
  int32_t zero_point[2] = {};  // of codes
};

template <typename Operands, typename Params>
__device__ __forceinline__ void load_row_scales(GemmSm90RowFactors& of_rows, const Params& p, int32_t first_row,
                                                int lane) {
  if constexpr (Operands::kScaled) {
    const int32_t row = first_row + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row + 8 * r >= p.m) continue;
      of_rows.scale[r] = Operands::row_scale(p, row + 8 * r);
      if constexpr (kGemmSm90HasZeroPoints<Operands>) of_rows.zero_point[r] = zero_point_of(p, row + 8 * r);
    }
  }
}

// Of norms, behind the kernel that gives them (no __ldg: it may have run beside this one).
template <int HALVES, typename Params>
__device__ __forceinline__ void load_row_norms(GemmSm90RowFactors (&of_rows)[HALVES], const Params& p,
                                               int32_t first_row, int32_t lane) {
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = first_row + half * 64 + 8 * r + lane / 4;
      if (row >= p.m) continue;
      const float2 norm = __ldcg(p.row_norms + row);
      of_rows[half].scale[r] = norm.x;
      of_rows[half].mean[r] = norm.y;
    }
  }
}

// Four tiles of sums of codes become those of codes less their rows' zero points. lane_code_sums: of the lane's first
// two columns, in shared memory.
template <int NUM_TILES>
__device__ __forceinline__ void take_off_zero_points(int32_t (&sums)[NUM_TILES][4], int tile,
                                                     const GemmSm90RowFactors& of_row, uint32_t lane_code_sums) {
#pragma unroll
  for (int t = tile; t < tile + 4; ++t) {
    const float2 code_sums = load_shared_pair(lane_code_sums + t * 8 * sizeof(int32_t));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[t][j] -= of_row.zero_point[j / 2] * __float_as_int(j % 2 == 0 ? code_sums.x : code_sums.y);
    }
  }
}

// What a warp has of a tile, 16 rows of each half of it, scaled, with the bias added, and what the epilogue makes of
// that, to memory, as far as they lie before end_row.
template <int BLOCK_N, typename Epilogue = GemmSm90Plain, int HALVES, typename Operands, typename Sum, typename Params,
          typename Added>
__device__ __forceinline__ void store_rows(Sum (&acc)[HALVES][BLOCK_N / 8][4],
                                           const GemmSm90Columns<Operands, BLOCK_N>& columns,
                                           const GemmSm90RowFactors (&of_rows)[HALVES], const Params& p,
                                           int32_t first_row, int32_t end_row, int32_t first_n, Added& added,
                                           int lane) {
  using T = typename Operands::Out;
  // A lane has rows `row` and + 8 of a half, and after gather_columns 8 columns of 32 of each.
  constexpr int PER_COLUMN = Epilogue::kRows;
  static_assert(BLOCK_N / PER_COLUMN % 32 == 0, "a lane has 8 columns of 32 of out");
  const int32_t row = first_row + lane / 4;
  const int32_t column = first_n / PER_COLUMN + lane % 4 * 8;
  const int64_t width = p.n / PER_COLUMN;  // of out
  const int32_t end = static_cast<int32_t>(width) - column;
  int32_t ends[HALVES][2];
  T* rows[HALVES][2];
#pragma unroll
  for (int half = 0; half < HALVES; ++half) {
    const int32_t half_row = row + half * 64;
    ends[half][0] = half_row < end_row ? end : 0;
    ends[half][1] = half_row + 8 < end_row ? end : 0;
    rows[half][0] = static_cast<T*>(p.out) + half_row * width + column;
    rows[half][1] = rows[half][0] + 8 * width;
  }
  // By addresses in shared memory: a store to `out` may change what a pointer points to, and loads would stay behind
  // it.
  const uint32_t lane_factors = shared_address(columns.factors + lane % 4 * 2);
  const uint32_t lane_bias = shared_address(columns.bias + lane % 4);
  uint32_t words[HALVES][2][4];  // of 32 columns of out
#pragma unroll
  for (int t = 0; t < BLOCK_N / 8; t += 4) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half) {
      if constexpr (GemmSm90Columns<Operands, BLOCK_N>::kHasCodeSums) {
        if (p.x_zero_point != nullptr) {
          take_off_zero_points(acc[half], t, of_rows[half], lane_factors + BLOCK_N * sizeof(float));
        }
      }
      float (&values)[4][4] = floats_of(acc[half], t);
      const GemmSm90RowFactors& of_row = of_rows[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 factors = {};
        if constexpr (GemmSm90Columns<Operands, BLOCK_N>::kHasFactors) {
          factors = load_shared_pair(lane_factors + (t + i) * 8 * sizeof(float));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float factor = j % 2 == 0 ? factors.x : factors.y;
          if constexpr (Operands::kScaled) values[i][j] = __fmul_rn(values[i][j], of_row.scale[j / 2] * factor);
          if constexpr (Operands::kNorm == GemmSm90Norm::kLayer) values[i][j] -= of_row.mean[j / 2] * factor;
          if constexpr (Operands::kNorm != GemmSm90Norm::kNone) values[i][j] *= of_row.scale[j / 2];
        }
      }
      if (p.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 value = unpack_pair<T>(load_shared(lane_bias + (t + i) * 4 * sizeof(uint32_t)));
#pragma unroll
          for (int j = 0; j < 4; ++j) values[i][j] += j % 2 == 0 ? value.x : value.y;
        }
      }
      const int chunk = t / 4 * HALVES + half;
      if constexpr (Epilogue::kAdds) added.add_to(values, chunk);
#pragma unroll
      for (int i = 0; i < 4; i += PER_COLUMN) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float sums[PER_COLUMN];
#pragma unroll
          for (int which = 0; which < PER_COLUMN; ++which) sums[which] = values[i + which][j];
          values[i][j] = Epilogue::apply(p, sums);
        }
      }
      const int out_t = t / PER_COLUMN, first = out_t / 4 * 32;  // tiles of out, and its first column of these 32
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t (&w)[4] = words[half][r];
#pragma unroll
        for (int i = 0; i < 4; i += PER_COLUMN) {
          w[out_t % 4 + i / PER_COLUMN] = pack_pair<T>(values[i][2 * r], values[i][2 * r + 1]);
        }
        if ((t + 4) / PER_COLUMN % 4 != 0) continue;
        gather_columns(w, lane);
        if constexpr (Epilogue::kAdds) {
          added.store(w, chunk, r);
        } else if (first < ends[half][r]) {
          *reinterpret_cast<uint4*>(rows[half][r] + first) = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
    }
  }
}

// A matrix of so many rows as the copy engine sees it, in boxes of a panel of `box_rows` rows.
template <typename Operands>
cudaError_t make_matrix_map(CUtensorMap* map, const GemmSm90Params& p, const void* matrix, int64_t rows, int64_t stride,
                            int box_rows, bool reads_ahead) {
  constexpr int kPanel = kGemmSm90PanelBytes / sizeof(typename Operands::Element);
  return make_tensor_map(map,
                         {matrix, Operands::kDType, {p.k, rows, 1, 1}, {stride, 0, 0}, kPanel, box_rows, reads_ahead});
}

}  // namespace fastattn
