// The Hopper GEMM for weights of 4 bits: the weight streams by packed, and becomes wgmma's left operand in registers.
//
//   out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n]     summed in fp32, rounded once; types and scales:
//   x (M, K)   weight (N, K / 2) bytes of two codes        gemm_sm90_w4_operands.cuh      out (M, N)
//
//   Operands are swapped as in gemm_sm90_few_rows.cuh, and the K of a tile is shared out over the CTAs of a cluster as
//   there. A CTA has block_n / 64 groups, each with 64 rows of weight.
//
//   a warp     weight (block_n x 128 bytes), x (block_m x 256), one stage after the other, by the copy engine
//   a group    the products of a stage (gemm_sm90_w4_products.cuh), one after the other
//
// The codes stay as checkpoints have them: rows are fetched in swizzled panels of 128 bytes, of which the four lanes
// that share a row of A read the same 16 bytes at once, 32 columns, and keep what is theirs (gemm_sm90_w4_formats.cuh).
// Scales go from memory to registers.
//
// Limits: 16-byte aligned rows of x and of packed weight, K a multiple of 64 (of 32 with x in 8 bits), N of 8, groups
// as GemmSm90W4Params has them. Rows past M or N and columns past K are zeros in shared memory.
#pragma once

#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/tensor_map.h"
#include "arch/tma.cuh"
#include "arch/vec.cuh"
#include "arch/wgmma.cuh"
#include "gemm/gemm_sm90_sums.cuh"
#include "gemm/gemm_sm90_w4_products.cuh"

namespace fastattn {

struct GemmSm90W4Args {
  GemmSm90W4Params p;
  CUtensorMap x, weight;
};

template <typename Element, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM>
struct GemmSm90W4Storage {
  static constexpr int kStages = gemm_sm90_w4_stages({BLOCK_M, BLOCK_N, CTAS_PER_SM}, sizeof(Element));
  static_assert(kStages >= 2, "a stage is released while the next one is computed");
  static constexpr int kPanel = 128 / sizeof(Element), kPanels = kGemmSm90W4StageK / kPanel;  // of x
  static constexpr uint32_t kWeightBytes = BLOCK_N * kGemmSm90W4StageK / 2;
  static constexpr uint32_t kPanelBytes = BLOCK_M * 128, kXBytes = kPanels * kPanelBytes;

  struct Ring {
    alignas(1024) unsigned char weight[kStages][kWeightBytes];
    alignas(1024) Element x[kStages][kPanels][BLOCK_M * kPanel];
  };
  union {
    Ring ring;
    GemmSm90Sums<float, BLOCK_M, BLOCK_N, BLOCK_N / 16> sums;  // when the ring is no longer needed
  };
  MBarrier full[kStages], empty[kStages];
};

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM>
__global__ void __launch_bounds__(2 * BLOCK_N + 32, CTAS_PER_SM)
    gemm_sm90_w4_kernel(const __grid_constant__ GemmSm90W4Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = typename Operands::Out;
  using Scales = GemmSm90W4Scales<typename Operands::Format>;
  using Storage = GemmSm90W4Storage<typename Operands::Element, BLOCK_M, BLOCK_N, CTAS_PER_SM>;
  constexpr int STAGES = Storage::kStages;
  constexpr int STAGE_K = kGemmSm90W4StageK;
  constexpr int NUM_WARPS = BLOCK_N / 16;

  Storage& smem = shared_storage<Storage>();
  const GemmSm90W4Params& p = args.p;
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int32_t rank = static_cast<int32_t>(cluster_rank()), num_splits = p.config.num_splits;

  // Clusters that share rows of weight are neighbours.
  const int32_t tile_idx = static_cast<int32_t>(blockIdx.x) / num_splits;
  const int32_t m_tiles = static_cast<int32_t>(p.config.m_tiles);
  const int32_t first_n = tile_idx / m_tiles * BLOCK_N, first_m = tile_idx % m_tiles * BLOCK_M;
  const int32_t column = first_n + smem.sums.first_column();  // which a lane writes, with the next three
  const int32_t all_steps = (static_cast<int32_t>(p.k) - 1) / STAGE_K + 1;
  const int32_t begin_step = rank * all_steps / num_splits;
  const int32_t end_step = (rank + 1) * all_steps / num_splits;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      smem.full[i].init(1);
      smem.empty[i].init(NUM_WARPS);
    }
    fence_barrier_init();
  }
  __syncthreads();

  RingPosition<STAGES> position;
  if (warp_idx == NUM_WARPS) {
    // ------------------------------------------------------------------------------- producer
    if (lane == 0) {
      const uint64_t policy = evict_first_policy();
      for (int32_t step = begin_step; step < min(begin_step + STAGES, end_step); ++step) {
        tma_prefetch_4d(args.weight, step * (STAGE_K / 2), first_n, 0, 0, policy);
      }
      grid_dependency_wait();
      for (int32_t step = begin_step; step < end_step; ++step) {
        const uint32_t stage = position.stage();
        MBarrier& full = smem.full[stage];
        smem.empty[stage].wait(position.parity() ^ 1);
        full.arrive_expect_bytes(Storage::kWeightBytes + Storage::kXBytes);
        if (m_tiles == 1) {
          tma_load_4d(smem.ring.weight[stage], args.weight, full, step * (STAGE_K / 2), first_n, 0, 0, policy);
        } else {
          tma_load_4d(smem.ring.weight[stage], args.weight, full, step * (STAGE_K / 2), first_n, 0, 0);
        }
        for (int panel = 0; panel < Storage::kPanels; ++panel) {
          tma_load_4d(smem.ring.x[stage][panel], args.x, full, step * STAGE_K + panel * Storage::kPanel, first_m, 0, 0);
        }
        position.advance();
      }
    }
    __syncwarp();
    grid_dependency_launch();  // when memory would soon have nothing to do: gemm_sm90_few_rows.cuh
  } else {
    // ------------------------------------------------------------------------------ consumers
    const int row = warp_idx * 16 + lane / 4;  // and the one 8 below
    Scales::prefetch(p, first_n + row, begin_step, end_step, lane);
    if (column < p.n) {
      if (p.global_scale != nullptr) prefetch_l2(p.global_scale + column);
      if (p.bias != nullptr) prefetch_l2(static_cast<const T*>(p.bias) + column);
    }
    grid_dependency_wait();
    const uint32_t first_rows = shared_address(smem.ring.weight[0]) + row * 128;
    const WgmmaDescriptor x = WgmmaDescriptor::make<128>(smem.ring.x[0][0], 0);
    Scales scales;
    scales.load(p, first_n + row, begin_step, lane);
    float acc[BLOCK_M / 8][4];
    uint32_t a[2][2][4];  // two sets of two fragments
#pragma unroll 1
    for (int32_t step = begin_step; step < end_step; ++step) {
      scales.take();
      scales.load(p, first_n + row, min(step + 1, end_step - 1), lane);
      const uint32_t stage = position.stage();
      smem.full[stage].wait(position.parity());
      const uint32_t rows = first_rows + stage * Storage::kWeightBytes;
      const WgmmaDescriptor stage_x = x.uniform_plus(stage * Storage::kXBytes);
      const auto release = [&](int i) {
        if (i == 1 && position.count > 0 && lane == 0) smem.empty[(position.count - 1) % STAGES].arrive();
      };
      const auto x_of = [&](int i) {
        return WgmmaDescriptor{stage_x.low + i / 2 * Storage::kPanelBytes / 16, stage_x.high};
      };
      multiply_w4_stage<Operands, BLOCK_M>(acc, a, rows, scales, step == begin_step, lane, release, x_of);
      position.advance();
    }
    wgmma_wait<0>();
    pin_registers(a[0]);
    pin_registers(a[1]);
    pin_registers(acc);
    named_barrier_sync(1, 32 * NUM_WARPS);  // all groups are done with the ring
    smem.sums.keep(acc, warp_idx, lane);
  }
  cluster_sync();

  // ---- epilogue: a lane writes four columns
  if (threadIdx.x < 32 * NUM_WARPS && column < p.n) {
    float bias[4] = {}, factors[4];
    if (p.bias != nullptr) load_vec<4>(static_cast<const T*>(p.bias) + column, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) factors[i] = Operands::column_factor(p, column + i);
    const int32_t num_rows = min(BLOCK_M, static_cast<int32_t>(p.m) - first_m);
    smem.sums.add_up(num_rows, rank, num_splits, GemmSm90NoOthers(), [&](int32_t row, const float4(&sum)[1], auto) {
      const float sums[4] = {sum[0].x, sum[0].y, sum[0].z, sum[0].w}, scale = Operands::x_scale(p, first_m + row);
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = sums[i] * (scale * factors[i]) + bias[i];
      store_vec<4>(static_cast<T*>(p.out) + (first_m + row) * p.n + column, values);
    });
  }
  __syncwarp();
  cluster_meet();  // the others may still read from this CTA
#endif
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM>
cudaError_t launch_gemm_sm90_w4(const GemmSm90W4Params& p, cudaStream_t stream) {
  using Storage = GemmSm90W4Storage<typename Operands::Element, BLOCK_M, BLOCK_N, CTAS_PER_SM>;
  static_assert(sizeof(Storage) <= 227 * 1024 / CTAS_PER_SM - 1024);
  GemmSm90W4Args args = {p, {}, {}};
  cudaError_t error = make_tensor_map(
      &args.x, {p.x, Operands::kDType, {p.k, p.m, 1, 1}, {p.x_stride, 0, 0}, Storage::kPanel, BLOCK_M, false});
  if (error == cudaSuccess) {
    // Bytes, whatever they mean.
    error = make_tensor_map(&args.weight, {p.weight,
                                           DType::kFloat8E4M3,
                                           {p.k / 2, p.n, 1, 1},
                                           {p.weight_stride, 0, 0},
                                           kGemmSm90W4StageK / 2,
                                           BLOCK_N,
                                           false});
  }
  if (error != cudaSuccess) return error;
  return launch_clusters(gemm_sm90_w4_kernel<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM>, p.config.num_ctas,
                         p.config.num_splits, 2 * BLOCK_N + 32, sizeof(Storage) + 1024, stream, args);
}

struct GemmSm90W4Instantiation {
  GemmSm90Tile tile;
  cudaError_t (*launch)(const GemmSm90W4Params&, cudaStream_t);
};

template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM>
constexpr GemmSm90W4Instantiation kGemmSm90W4Of = {{BLOCK_M, BLOCK_N, CTAS_PER_SM},
                                                   launch_gemm_sm90_w4<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM>};

// Which exist, for every format, and with x in e4m3: add a line here and in gemm_sm90_w4_config.h.
template <typename Operands>
constexpr GemmSm90W4Instantiation kGemmSm90W4Instantiations[] = {
    kGemmSm90W4Of<Operands, 8, 128, 2>,  kGemmSm90W4Of<Operands, 16, 128, 2>,  kGemmSm90W4Of<Operands, 32, 128, 2>,
    kGemmSm90W4Of<Operands, 64, 128, 2>, kGemmSm90W4Of<Operands, 128, 128, 1>, kGemmSm90W4Of<Operands, 128, 192, 1>,
};
template <typename T, int GROUP>
constexpr GemmSm90W4Instantiation kGemmSm90W4Instantiations<GemmSm90W4A8<T, GROUP>>[] = {
    kGemmSm90W4Of<GemmSm90W4A8<T, GROUP>, 16, 128, 2>,
    kGemmSm90W4Of<GemmSm90W4A8<T, GROUP>, 64, 128, 2>,
    kGemmSm90W4Of<GemmSm90W4A8<T, GROUP>, 128, 128, 1>,
};

template <typename Operands>
cudaError_t run_gemm_sm90_w4(const GemmSm90W4Params& params, cudaStream_t stream) {
  const GemmSm90Tile& wanted = params.config.tile;
  for (const GemmSm90W4Instantiation& entry : kGemmSm90W4Instantiations<Operands>) {
    if (entry.tile.block_m == wanted.block_m && entry.tile.block_n == wanted.block_n &&
        entry.tile.ctas_per_sm == wanted.ctas_per_sm) {
      return entry.launch(params, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
