// Hopper's warpgroup product with a left operand that is 2:4 sparse: of each four neighbours in a row two are stored,
// and two bits for each say which. D (64, N) += A (64, K) B (K, N), both K-major in shared memory, where A has 32 bytes
// a row of what is stored, and B 64: K is 32 of 16-bit elements, 64 of 8-bit ones. As fast as the dense product of half
// the K.
//
// Metadata, four bits for four columns: the place of the first element stored and, shifted by two, of the second, which
// comes later. Lane 4 g + q of warp w, which has rows 16 w … 16 w + 15, gives a register:
//
//   16 bits    columns 16 (q % 2) and on, 16 of them: row g in bits 0 … 15, row g + 8 in bits 16 … 31; only of
//              the lanes with q / 2 = SELECTOR, so that a register has two products' metadata
//   8 bits     columns 32 (q / 2) and on, 32 of them: row g + 8 (q % 2); SELECTOR 0
//
// (PTX ISA, "Sparse matrix storage" of wgmma.mma_async.sp.)
//
// Order: as in arch/wgmma.cuh, and between a product and its wait nothing may touch the register of its metadata
// either. PTX says so of accumulators and fragments of A only, but with metadata loaded anew sums were wrong on an
// H200.
#pragma once

#include "arch/wgmma.cuh"

namespace fastattn {

// pin_registers for metadata.
template <int NUM_WORDS>
__device__ __forceinline__ void pin_metadata(uint32_t (&words)[NUM_WORDS]) {
#pragma unroll
  for (uint32_t& word : words) asm volatile("" : "+r"(word)::"memory");
}

template <typename T, int N>
struct SparseWgmma;

#undef FA_ACC
#define FA_ACC(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FA_SPARSE(TYPE, SUM, SHAPE, NAMES, BEHIND, N, P0, P1, P2, P3, P4)                                           \
  template <>                                                                                                       \
  struct SparseWgmma<TYPE, N> {                                                                                     \
    template <int SELECTOR>                                                                                         \
    __device__ __forceinline__ static void ss(SUM (&d)[N / 8][4], uint64_t a, uint64_t b, const uint32_t& metadata, \
                                              int scale_d) {                                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P3                                                           \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sp.sync.aligned.m64n" #N SHAPE "." NAMES " {" FA_REGS##N                        \
                   "}, " P0 ", " P1 ", " P2 ", " P4 ", p" BEHIND ";\n}\n"                                           \
                   : FA_ACCS##N                                                                                     \
                   : "l"(a), "l"(b), "r"(metadata), "r"(scale_d), "n"(SELECTOR));                                   \
    }                                                                                                               \
  };
#define FA_SPARSE_FLOATS(...)                                                          \
  FA_SPARSE(__nv_bfloat16, float, "k32", "f32.bf16.bf16", ", 1, 1, 0, 0", __VA_ARGS__) \
  FA_SPARSE(__half, float, "k32", "f32.f16.f16", ", 1, 1, 0, 0", __VA_ARGS__)          \
  FA_SPARSE(__nv_fp8_e4m3, float, "k64", "f32.e4m3.e4m3", ", 1, 1", __VA_ARGS__)
#define FA_SPARSE_INT8(...) FA_SPARSE(int8_t, int32_t, "k64", "s32.s8.s8", "", __VA_ARGS__)

FA_SPARSE_FLOATS(16, "%8", "%9", "%10", "%11", "%12")
FA_SPARSE_FLOATS(64, "%32", "%33", "%34", "%35", "%36")
FA_SPARSE_FLOATS(128, "%64", "%65", "%66", "%67", "%68")
FA_SPARSE_FLOATS(256, "%128", "%129", "%130", "%131", "%132")

#undef FA_ACC
#define FA_ACC(i) "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])
FA_SPARSE_INT8(16, "%8", "%9", "%10", "%11", "%12")
FA_SPARSE_INT8(64, "%32", "%33", "%34", "%35", "%36")
FA_SPARSE_INT8(128, "%64", "%65", "%66", "%67", "%68")
FA_SPARSE_INT8(256, "%128", "%129", "%130", "%131", "%132")

#undef FA_SPARSE_INT8
#undef FA_SPARSE_FLOATS
#undef FA_SPARSE

}  // namespace fastattn
