// The products of a stage in the Hopper GEMM for weights of 4 bits as checkpoints have them (gemm_sm90_w4.cuh): 256
// columns, of which a lane makes wgmma's left operand in registers while the products before them run.
#pragma once

#include "arch/mbarrier.cuh"
#include "arch/wgmma.cuh"
#include "gemm/gemm_sm90_w4_operands.cuh"

namespace fastattn {

// acc (64, BLOCK_M) += the products of a stage's weight and of x, in two sets of two fragments that live from one stage
// to the next. `rows`: where the lane's first row begins in the weight, whose chunks of 16 bytes change places within
// eight rows.
//
//   codes of i │ wait for the products of i - 2 │ released(i) │ A fragments in their place │ x_of(i) │ products of i
//   ◄──────────────────────────── the products of i - 1 run ────────────────────────────►
//
// i counts two products, 64 bytes of a row of x. released(i): what the products up to i - 2 have read is free. x_of(i):
// where the panel of x is, 128 bytes a row, that i has half of. is_first: acc has nothing yet.
template <typename Operands, int BLOCK_M, typename Released, typename XOf>
__device__ __forceinline__ void multiply_w4_stage(float (&acc)[BLOCK_M / 8][4], uint32_t (&a)[2][2][4], uint32_t rows,
                                                  const GemmSm90W4Scales<typename Operands::Format>& scales,
                                                  bool is_first, int lane, Released released, XOf x_of) {
  using Element = typename Operands::Element;
  using Product = Wgmma<Element, BLOCK_M>;
  constexpr int COLUMNS = 64 / sizeof(Element), CODES = COLUMNS / 32;
#pragma unroll
  for (int i = 0; i < kGemmSm90W4StageK / COLUMNS; ++i) {
    uint32_t (&fragments)[2][4] = a[i % 2];
    typename Operands::Codes codes[CODES];
#pragma unroll
    for (int j = 0; j < CODES; ++j) codes[j] = Operands::load(rows + ((i * CODES + j) ^ lane / 4) * 16, lane);
    wgmma_wait<1>();
    pin_registers(fragments);
    released(i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Operands::make_fragment(fragments[j], codes[j * CODES / 2], j, scales, i * COLUMNS + j * COLUMNS / 2, lane);
    }
    const WgmmaDescriptor x = x_of(i);
    wgmma_fence();
    Product::rs_k(acc, fragments[0], x.plus(i % 2 * 64), i > 0 || !is_first);
    Product::rs_k(acc, fragments[1], x.plus(i % 2 * 64 + 32), 1);
    wgmma_commit();
  }
}

}  // namespace fastattn
