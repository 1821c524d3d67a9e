// What the two Hopper GEMMs share: tiles in shared memory, a consumer's walk over K, and the tensors' maps.
#pragma once

#include "arch/fragments.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/registers.cuh"
#include "arch/tensor_map.h"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "gemm/gemm_sm90.h"

namespace fastattn {

struct GemmSm90Args {
  GemmSm90Params p;
  CUtensorMap x, weight;
};

constexpr int kGemmSm90Consumers = 2;                            // warp groups
constexpr int kGemmSm90Threads = 128 * kGemmSm90Consumers + 32;  // and a warp that loads
constexpr int kGemmSm90Panel = 64;                               // columns of K that lie together, 128 bytes
constexpr int kGemmSm90SmemBytes = 227 * 1024 - 1024;            // of a CTA; the rest is spent on alignment

// A ring of stages, each PANELS panels of A_ROWS rows of the operand that fills wgmma's 64 rows, and of B_ROWS of the
// other.
template <typename T, int A_ROWS, int B_ROWS, int PANELS, int STAGES>
struct GemmSm90Ring {
  static_assert(STAGES >= 2, "a stage is released while the next one is computed");
  static constexpr int kRowsA = A_ROWS, kPanels = PANELS, kStages = STAGES;
  static constexpr int kStageK = PANELS * kGemmSm90Panel;
  static constexpr uint32_t kBytesA = A_ROWS * kStageK * sizeof(T), kBytesB = B_ROWS * kStageK * sizeof(T);

  alignas(1024) T a[STAGES][PANELS][A_ROWS * kGemmSm90Panel];
  alignas(1024) T b[STAGES][PANELS][B_ROWS * kGemmSm90Panel];
};

// acc (64, B_ROWS) = A B^T over so many stages, one at least. A consumer takes rows 64 `group` and on of A; where there
// are 64 only, every other panel of them, and two consumers have to add up what they get. A stage
// is released when the products of the next one have been issued: the tensor cores always have some at hand.
template <typename T, int B_ROWS, typename Ring, typename Release>
__device__ __forceinline__ void multiply_stages(float (&acc)[B_ROWS / 8][4], const Ring& ring, MBarrier* full,
                                                RingPosition<Ring::kStages>& position, int32_t num_stages, int group,
                                                Release release) {
  constexpr int PANELS_APART = Ring::kRowsA == 64 ? 2 : 1;
  constexpr uint32_t PANEL_BYTES_A = Ring::kBytesA / Ring::kPanels, PANEL_BYTES_B = Ring::kBytesB / Ring::kPanels;
  const WgmmaDescriptor a =
      WgmmaDescriptor::make<128>(ring.a[0][0], 0).uniform_plus(group * 64 * kGemmSm90Panel * sizeof(T));
  const WgmmaDescriptor b =
      WgmmaDescriptor::make<128>(ring.b[0][0], 0).uniform_plus(PANELS_APART == 2 ? group * PANEL_BYTES_B : 0);
  uint32_t before = 0;
#pragma unroll 1
  for (int32_t i = 0; i < num_stages; ++i) {
    const uint32_t stage = position.stage();
    full[stage].wait(position.parity());
    const WgmmaDescriptor stage_a = a.uniform_plus(stage * Ring::kBytesA);
    const WgmmaDescriptor stage_b = b.uniform_plus(stage * Ring::kBytesB);
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < Ring::kPanels; panel += PANELS_APART) {
#pragma unroll
      for (int kk = 0; kk < kGemmSm90Panel / 16; ++kk) {
        Wgmma<T, B_ROWS>::ss(acc, stage_a.plus(panel * PANEL_BYTES_A + kk * 32),
                             stage_b.plus(panel * PANEL_BYTES_B + kk * 32), i > 0 || panel > 0 || kk > 0);
      }
    }
    wgmma_commit();
    if (i > 0) {
      wgmma_wait<1>();
      release(before);
    }
    before = stage;
    position.advance();
  }
  wgmma_wait<0>();
  pin_registers(acc);
  release(before);
}

// A matrix of so many rows as the copy engine sees it, in boxes of a panel of `box_rows` rows.
inline cudaError_t make_matrix_map(CUtensorMap* map, const GemmSm90Params& p, const void* matrix, int64_t rows,
                                   int64_t stride, int box_rows, bool reads_ahead) {
  return make_tensor_map(map,
                         {matrix, p.dtype, {p.k, rows, 1, 1}, {stride, 0, 0}, kGemmSm90Panel, box_rows, reads_ahead});
}

}  // namespace fastattn
