// The Hopper GEMM for weights of 4 bits and many rows of x: warps beside those that multiply make numbers of the weight
// in shared memory, once for 128 rows.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once; scales:
//   gemm_sm90_w4_operands.cuh x (M, K)   weight (N, K / 2) bytes of two codes        out (M, N)
//
//   a CTA takes 128 rows of x and block_n of weight, one tile after the other; stages are those of gemm_sm90.cuh,
//   panels of 128 bytes of a row:
//
//   converters   codes(k+1) to registers │ wait for a free stage │ x(k) by the copy engine │ weight(k): numbers │ full
//   group 0      k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//   group 1      k=0 │ 1 │ 2 │ … │ K-1 │ write │ k=0 │ 1 │ …
//
// Four lanes share a row of a panel, 32 bytes each: of 16 bits these are 16 columns, of 8 bits 32. Their codes are next
// to each other in memory, as checkpoints have them, so that a warp reads whole sectors; eight lanes that write 16
// bytes meet each bank once. A stage is full when x has come and every converting warp has arrived.
//
// There is no cluster: what a CTA reads of the weight is a quarter of what it makes of it, less than half of a tile in
// 16 bits.
//
// Limits: 16-byte aligned rows of x and of packed weight, K a multiple of 64 (of 32 with x in 8 bits), N of 8, groups
// as GemmSm90W4Params has them.
// Of x, rows past M and columns past K are zeros in shared memory; of the weight the last ones that there are stand in.
#pragma once

#include "gemm/gemm_sm90_tiles.cuh"
#include "gemm/gemm_sm90_w4_operands.cuh"

namespace fastattn {

struct GemmSm90W4ManyRowsArgs {
  GemmSm90W4Params p;
  CUtensorMap x;
};

// Threads that convert. Products of 64 x 256 want 154 registers of a thread when it begins, which four warp groups have
// not; three have 168 each, as those that multiply get of four.
template <int BLOCK_N>
constexpr int kGemmSm90W4Converters = BLOCK_N == 256 ? 128 : 256;
template <int BLOCK_N>
constexpr int kGemmSm90W4ManyRowsThreads = 128 * kGemmSm90Consumers + kGemmSm90W4Converters<BLOCK_N>;
constexpr int kGemmSm90W4ConsumerRegisters = 168, kGemmSm90W4ConverterRegisters = 88;

template <typename Weights, int BLOCK_N>
__global__ void __launch_bounds__(kGemmSm90W4ManyRowsThreads<BLOCK_N>, 1)
    gemm_sm90_w4_many_rows_kernel(const __grid_constant__ GemmSm90W4ManyRowsArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Element = typename Weights::Element;
  using Storage = GemmSm90Storage<Weights, BLOCK_N>;
  constexpr int PANEL = decltype(Storage::ring)::kPanel;
  constexpr int BLOCK_M = Storage::BLOCK_M;
  constexpr int STAGES = Storage::kStages;
  constexpr int NUM_WARPS = 4 * kGemmSm90Consumers;  // that multiply
  constexpr int CONVERTERS = kGemmSm90W4Converters<BLOCK_N>;
  constexpr bool MOVES_REGISTERS = CONVERTERS > 128;

  Storage& smem = shared_storage<Storage>();
  const GemmSm90W4Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    tma_prefetch_map(args.x);
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1 + CONVERTERS / 32);
      smem.empty[i].init(NUM_WARPS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  grid_dependency_launch();

  // ---- which tiles: in groups of rows, column by column, as in gemm_sm90.cuh
  const int32_t n_tiles = static_cast<int32_t>(p.config.n_tiles);
  const int32_t m_tiles = static_cast<int32_t>(p.config.m_tiles);
  const int32_t num_steps = (static_cast<int32_t>(p.k) - 1) / PANEL + 1;
  struct Tile {
    int32_t first_m, first_n;
  };
  const auto for_each_tile = [&](auto use) {
    for (int32_t idx = static_cast<int32_t>(blockIdx.x); idx < m_tiles * n_tiles;
         idx += static_cast<int32_t>(gridDim.x)) {
      const int32_t group_rows = p.config.group_rows;
      const int32_t group = idx / (group_rows * n_tiles);
      const int32_t in_group = idx - group * group_rows * n_tiles;
      const int32_t rows = min(group_rows, m_tiles - group * group_rows);
      const int32_t column = in_group / rows;
      use(Tile{(group * group_rows + in_group - column * rows) * BLOCK_M, column * BLOCK_N});
    }
  };

  RingPosition<STAGES> position;
  if (warp_idx >= NUM_WARPS) {
    // ----------------------------------------------------------------------------- converters
    if constexpr (MOVES_REGISTERS) give_registers<kGemmSm90W4ConverterRegisters>();
    constexpr int ROWS = CONVERTERS / 4, TURNS = BLOCK_N / ROWS;
    constexpr int STEPS_OF_LINE = 256 / PANEL;  // that 128 bytes of codes last
    static_assert(BLOCK_N % ROWS == 0);
    using Codes = typename Weights::Codes;
    const int thread = static_cast<int>(threadIdx.x) - 32 * NUM_WARPS;
    const int quarter = thread % 4;
    const int32_t lane_column = quarter * Weights::kColumns;
    const uint32_t place = (thread / 4 * kGemmSm90PanelBytes + quarter * 32) ^ thread / 4 % 8 * 16;  // swizzled
    const uint32_t first_place = shared_address(smem.ring.b[0][0]) + place;
    const int32_t k = static_cast<int32_t>(p.k), last_row = static_cast<int32_t>(p.n) - 1;
    const uint8_t* const weight = static_cast<const uint8_t*>(p.weight);
    grid_dependency_wait();
    for_each_tile([&](const Tile& tile) {
      typename Weights::Row rows[TURNS];
      Codes codes[TURNS];
      typename Weights::Raw scales[TURNS];
      const auto load = [&](int turn, int32_t column) {
        const int64_t row = min(tile.first_n + turn * ROWS + thread / 4, last_row);
        codes[turn] = __ldg(reinterpret_cast<const Codes*>(weight + row * p.weight_stride + column / 2));
        scales[turn] = Weights::load(p, row, column);
      };
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        rows[turn] = Weights::row_of(p, min(tile.first_n + turn * ROWS + thread / 4, last_row));
        load(turn, min(lane_column, k - Weights::kColumns));
      }
#pragma unroll 1
      for (int32_t step = 0; step < num_steps; ++step) {
        const uint32_t stage = position.stage();
        MBarrier& full = smem.full[stage];
        const int32_t column_ahead = (step + 2 * STEPS_OF_LINE) * PANEL;
        if (step % STEPS_OF_LINE == 0 && column_ahead < k) {
#pragma unroll
          for (int row = thread; row < BLOCK_N; row += CONVERTERS) {
            prefetch_l2(weight + min(tile.first_n + row, last_row) * p.weight_stride + column_ahead / 2);
          }
        }
        smem.empty[stage].wait(position.parity() ^ 1);
        if (thread == 0) {
          full.arrive_expect_bytes(BLOCK_M * kGemmSm90PanelBytes);
          tma_load_4d(smem.ring.a[stage][0], args.x, full, step * PANEL, tile.first_m, 0, 0);
        }
        __syncwarp();
        const int32_t next_column = min((step + 1) * PANEL + lane_column, k - Weights::kColumns);
        const uint32_t target = first_place + stage * decltype(smem.ring)::kBytesB;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
          uint4 chunks[2];
          Weights::make(chunks, codes[turn], scales[turn], rows[turn], quarter);
          store_shared_16_bytes(target + turn * ROWS * kGemmSm90PanelBytes, chunks[0]);
          store_shared_16_bytes((target ^ 16) + turn * ROWS * kGemmSm90PanelBytes, chunks[1]);
          load(turn, next_column);
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) full.arrive();
        position.advance();
      }
    });
  } else {
    // ------------------------------------------------------------------------------ consumers
    if constexpr (MOVES_REGISTERS) take_registers<kGemmSm90W4ConsumerRegisters>();
    grid_dependency_wait();
    const int group = warp_idx / 4;
    float acc[1][BLOCK_N / 8][4];
    const auto release = [&](uint32_t stage) {
      if (lane == 0) smem.empty[stage].arrive();
    };
    int buffer = 0;
    for_each_tile([&](const Tile& tile) {
      auto& columns = smem.columns[buffer][group];
      buffer ^= 1;
      columns.fetch(p, tile.first_n);
      const int32_t first_row = tile.first_m + group * 64 + warp_idx % 4 * 16;
      GemmSm90RowFactors of_rows[1];
      load_row_scales<Weights>(of_rows[0], p, first_row, lane);
      if constexpr (Weights::kTwoLevels) {
        static_assert(BLOCK_N <= kGemmSm90TwoLevelsMaxN, "a thread has 168 registers");
        constexpr int PART_N = BLOCK_N > 128 ? BLOCK_N / 2 : BLOCK_N;
        multiply_stages_in_two_levels<Element, BLOCK_N, PART_N>(acc[0], smem.ring, smem.full, position, num_steps,
                                                                group, release, GemmSm90Turns<false>{group});
      } else {
        multiply_stages<Element, BLOCK_N>(acc, smem.ring, smem.full, position, num_steps, group, release,
                                          [](uint32_t, int32_t) {});
      }
      columns.arrive(p, kGemmSm90GroupBarrier + group);
      store_rows<BLOCK_N>(acc, columns, of_rows, p, first_row, tile.first_n, lane);
    });
  }
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Weights, int BLOCK_N>
cudaError_t launch_gemm_sm90_w4_many_rows(const GemmSm90W4Params& p, cudaStream_t stream) {
  using Storage = GemmSm90Storage<Weights, BLOCK_N>;
  constexpr int kPanel = kGemmSm90PanelBytes / sizeof(typename Weights::Element);
  GemmSm90W4ManyRowsArgs args = {p, {}};
  const cudaError_t error = make_tensor_map(
      &args.x, {p.x, Weights::kDType, {p.k, p.m, 1, 1}, {p.x_stride, 0, 0}, kPanel, Storage::BLOCK_M, true});
  if (error != cudaSuccess) return error;
  return launch_kernel_behind(gemm_sm90_w4_many_rows_kernel<Weights, BLOCK_N>, p.config.num_ctas,
                              kGemmSm90W4ManyRowsThreads<BLOCK_N>, sizeof(Storage) + 1024, stream, args);
}

// Which exist, for every kind: add a case here and a tile in gemm_sm90_w4_config.h.
template <typename Weights>
cudaError_t run_gemm_sm90_w4_many_rows(const GemmSm90W4Params& p, cudaStream_t stream) {
  switch (p.config.tile.block_n) {
    case 128:
      return launch_gemm_sm90_w4_many_rows<Weights, 128>(p, stream);
    case 192:
      return launch_gemm_sm90_w4_many_rows<Weights, 192>(p, stream);
    case 256:
      if constexpr (!Weights::kTwoLevels) return launch_gemm_sm90_w4_many_rows<Weights, 256>(p, stream);
      return cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fastattn
