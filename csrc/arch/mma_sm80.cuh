// Tensor-core instructions of the sm_80 family: mma.sync.m16n8k16 with fp32 accumulation, its int8 sister, and the
// ldmatrix loads that fill their fragments.
//
// Fragment layout, with lane = 4 * g + t (g = 0..7, t = 0..3). Every register holds two 16-bit
// values, the lower column (for B: the lower k) in its low half:
//
//   A 16 x 16 (row, k)   a[0] = (g,     2t..2t+1)     a[1] = (g + 8, 2t..2t+1)
//                        a[2] = (g,     2t+8..2t+9)   a[3] = (g + 8, 2t+8..2t+9)
//   B 16 x 8  (k, col)   b0   = (2t..2t+1, g)         b1   = (2t+8..2t+9, g)
//   C 16 x 8  (row, col) c[0], c[1] = (g, 2t), (g, 2t+1)   c[2], c[3] = (g + 8, 2t), (g + 8, 2t+1)
//
// So two neighbouring C tiles (columns 0-7 and 8-15) are, once rounded, exactly one A fragment:
// that is how attention feeds P = exp(S) to the second product without leaving the registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "arch/fragments.cuh"
#include "arch/shared_memory.cuh"

namespace fastattn {

// Loads four 8 x 8 tiles of 16-bit values. Lane l gives the address of row l % 8 of tile l / 8
// (16 bytes, 16-byte aligned); r[i] receives, of tile i, row g, columns 2t and 2t + 1.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix_x4(r, shared_address(row)); }

// The same with every tile transposed: r[i] receives, of tile i, rows 2t and 2t + 1 of column g.
// This turns V, stored as (key, dim) with dim contiguous, into B fragments with k = key.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ldmatrix_x4_trans(r, shared_address(row));
}

// An 8 x 8 matrix of 16-bit values, of which a lane has row g, columns 2t and 2t + 1: of the transposed one it gets the
// same. So a C tile, once rounded, becomes a half of a B fragment.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(result) : "r"(pair));
  return result;
}

// c (16 x 8, fp32) += a (16 x 16) * b (16 x 8); one overload per operand type.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8, int32) += a (16 x 32) * b (32 x 8) of int8, exact but for overflow. A register holds 4 int8 where that of
// m16n8k16 holds two 16-bit values: a[0] = (g, 4t..4t+3), b0 = (4t..4t+3, g), and so on. Counted in bytes the layouts
// are the same, so ldmatrix on rows of int8 fills these fragments too.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from fragments to shared memory (sm_90): lane l gives the address, a multiple
// of 16 bytes, of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&fragments)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(fragments[0]),
               "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
               : "memory");
}
// The same with every tile transposed: lane l has the address of column l % 8 of tile l / 8, which becomes a row.
__device__ __forceinline__ void store_matrices_trans(uint32_t address, const uint32_t (&fragments)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
               "r"(fragments[0]), "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
               : "memory");
}

}  // namespace fastattn
