// Hopper's warpgroup matrix product: D (64, N) fp32 += A (64, 16) B (16, N), issued by 128 threads and run
// asynchronously. A comes from shared memory or registers, B from shared memory; 16-bit elements, or 8-bit ones, 32 of
// them a product.
//
// Accumulators: as in arch/mma_sm80.cuh, with warp w of the group on rows 16 w … 16 w + 15. Lane l holds,
// of every eight columns, columns 2 (l % 4) and + 1 of rows l / 4 and l / 4 + 8. Two neighbouring tiles of
// eight, rounded, are the A fragment of a product that sums over those sixteen columns.
//
// Order: fence, products, commit, wait. Between a product and its wait nothing may touch its registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "arch/wgmma_descriptor.cuh"

namespace fastattn {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Until at most `PENDING` committed groups are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of these registers across this point: it does not know that a
// product writes them later than where it is issued.
template <int NUM_TILES>
__device__ __forceinline__ void pin_registers(float (&acc)[NUM_TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < NUM_TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[tile][i])::"memory");
  }
}
template <typename Word, int NUM_TILES>
__device__ __forceinline__ void pin_registers(Word (&words)[NUM_TILES][4]) {
#pragma unroll
  for (int tile = 0; tile < NUM_TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(words[tile][i])::"memory");
  }
}

// Products for one type and one N. SS: both operands K-major in shared memory. SS_MN: both MN-major. RS: A in
// registers, B MN-major. RS_K: A in registers, B K-major. scale_d 0 overwrites the accumulators.
template <typename T, int N>
struct Wgmma;

// The instruction names every register, so that each N is spelled out: lists of operands by eights.
#define FA_ACC(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FA_ACC2(i) FA_ACC(i), FA_ACC(i + 1)
#define FA_ACC4(i) FA_ACC2(i), FA_ACC2(i + 2)
#define FA_ACC8(i) FA_ACC4(i), FA_ACC4(i + 4)
#define FA_ACC16(i) FA_ACC8(i), FA_ACC8(i + 8)

#define FA_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FA_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FA_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FA_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FA_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FA_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FA_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FA_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FA_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FA_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FA_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FA_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FA_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FA_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FA_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FA_R15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define FA_WGMMA(TYPE, NAME, N, REGS, ACCS, P0, P1, P2, P3, P4, P5)                                                    \
  template <>                                                                                                          \
  struct Wgmma<TYPE, N> {                                                                                              \
    __device__ __forceinline__ static void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                              \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, " P0 ", " P1          \
                   ", p, 1, 1, 0, 0;\n}\n"                                                                             \
                   : ACCS                                                                                              \
                   : "l"(a), "l"(b), "r"(scale_d));                                                                    \
    }                                                                                                                  \
    __device__ __forceinline__ static void ss_mn(float (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                              \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, " P0 ", " P1          \
                   ", p, 1, 1, 1, 1;\n}\n"                                                                             \
                   : ACCS                                                                                              \
                   : "l"(a), "l"(b), "r"(scale_d));                                                                    \
    }                                                                                                                  \
    __device__ __forceinline__ static void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int scale_d) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                              \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, {" P0 ", " P1 ", " P2 \
                   ", " P3 "}, " P4 ", p, 1, 1, 1;\n}\n"                                                               \
                   : ACCS                                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));                                \
    }                                                                                                                  \
    __device__ __forceinline__ static void rs_k(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,              \
                                                int scale_d) {                                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                              \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS "}, {" P0 ", " P1 ", " P2 \
                   ", " P3 "}, " P4 ", p, 1, 1, 0;\n}\n"                                                               \
                   : ACCS                                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));                                \
    }                                                                                                                  \
  };
#define FA_WGMMA_BOTH(N, P0, P1, P2, P3, P4, P5)                                     \
  FA_WGMMA(__nv_bfloat16, "bf16", N, FA_REGS##N, FA_ACCS##N, P0, P1, P2, P3, P4, P5) \
  FA_WGMMA(__half, "f16", N, FA_REGS##N, FA_ACCS##N, P0, P1, P2, P3, P4, P5)
#define FA_REGS8 "%0, %1, %2, %3"
#define FA_ACCS8 FA_ACC(0)
#define FA_REGS16 FA_R0
#define FA_ACCS16 FA_ACC2(0)
#define FA_REGS32 FA_R0 ", " FA_R1
#define FA_ACCS32 FA_ACC4(0)
#define FA_REGS48 FA_R0 ", " FA_R1 ", " FA_R2
#define FA_ACCS48 FA_ACC4(0), FA_ACC2(4)
#define FA_REGS64 FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3
#define FA_ACCS64 FA_ACC8(0)
#define FA_REGS80 FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3 ", " FA_R4
#define FA_ACCS80 FA_ACC8(0), FA_ACC2(8)
#define FA_REGS96 FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3 ", " FA_R4 ", " FA_R5
#define FA_ACCS96 FA_ACC8(0), FA_ACC4(8)
#define FA_REGS112 FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3 ", " FA_R4 ", " FA_R5 ", " FA_R6
#define FA_ACCS112 FA_ACC8(0), FA_ACC4(8), FA_ACC2(12)
#define FA_REGS128 FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3 ", " FA_R4 ", " FA_R5 ", " FA_R6 ", " FA_R7
#define FA_ACCS128 FA_ACC16(0)
#define FA_REGS144 FA_REGS128 ", " FA_R8
#define FA_ACCS144 FA_ACC16(0), FA_ACC2(16)
#define FA_REGS160 FA_REGS144 ", " FA_R9
#define FA_ACCS160 FA_ACC16(0), FA_ACC4(16)
#define FA_REGS192                                                                                                     \
  FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3 ", " FA_R4 ", " FA_R5 ", " FA_R6 ", " FA_R7 ", " FA_R8 ", " FA_R9 ", " FA_R10 \
        ", " FA_R11
#define FA_ACCS192 FA_ACC16(0), FA_ACC8(16)
#define FA_REGS224 FA_REGS192 ", " FA_R12 ", " FA_R13
#define FA_ACCS224 FA_ACCS192, FA_ACC4(24)
#define FA_REGS256                                                                                                     \
  FA_R0 ", " FA_R1 ", " FA_R2 ", " FA_R3 ", " FA_R4 ", " FA_R5 ", " FA_R6 ", " FA_R7 ", " FA_R8 ", " FA_R9 ", " FA_R10 \
        ", " FA_R11 ", " FA_R12 ", " FA_R13 ", " FA_R14 ", " FA_R15
#define FA_ACCS256 FA_ACC16(0), FA_ACC16(16)

FA_WGMMA_BOTH(8, "%4", "%5", "%6", "%7", "%8", "%9")
FA_WGMMA_BOTH(16, "%8", "%9", "%10", "%11", "%12", "%13")
FA_WGMMA_BOTH(32, "%16", "%17", "%18", "%19", "%20", "%21")
FA_WGMMA_BOTH(48, "%24", "%25", "%26", "%27", "%28", "%29")
FA_WGMMA_BOTH(64, "%32", "%33", "%34", "%35", "%36", "%37")
FA_WGMMA_BOTH(80, "%40", "%41", "%42", "%43", "%44", "%45")
FA_WGMMA_BOTH(96, "%48", "%49", "%50", "%51", "%52", "%53")
FA_WGMMA_BOTH(112, "%56", "%57", "%58", "%59", "%60", "%61")
FA_WGMMA_BOTH(128, "%64", "%65", "%66", "%67", "%68", "%69")
FA_WGMMA_BOTH(144, "%72", "%73", "%74", "%75", "%76", "%77")
FA_WGMMA_BOTH(160, "%80", "%81", "%82", "%83", "%84", "%85")
FA_WGMMA_BOTH(192, "%96", "%97", "%98", "%99", "%100", "%101")
FA_WGMMA_BOTH(224, "%112", "%113", "%114", "%115", "%116", "%117")
FA_WGMMA_BOTH(256, "%128", "%129", "%130", "%131", "%132", "%133")

// fp8: a product sums over 32 bytes, and takes B K-major only.
#define FA_WGMMA_FP8(N, P0, P1, P2, P3, P4, P5)                                                                        \
  template <>                                                                                                          \
  struct Wgmma<__nv_fp8_e4m3, N> {                                                                                     \
    __device__ __forceinline__ static void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {             \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                              \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" FA_REGS##N "}, " P0 ", " P1            \
                                                                                           ", p, 1, 1;\n}\n"           \
                   : FA_ACCS##N                                                                                        \
                   : "l"(a), "l"(b), "r"(scale_d));                                                                    \
    }                                                                                                                  \
    __device__ __forceinline__ static void rs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int scale_d) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                              \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" FA_REGS##N                             \
                   "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1;\n}\n"                                        \
                   : FA_ACCS##N                                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d));                                \
    }                                                                                                                  \
    __device__ __forceinline__ static void rs_k(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,              \
                                                int scale_d) {                                                         \
      rs(d, a, b, scale_d);                                                                                            \
    }                                                                                                                  \
  };
FA_WGMMA_FP8(8, "%4", "%5", "%6", "%7", "%8", "%9")
FA_WGMMA_FP8(16, "%8", "%9", "%10", "%11", "%12", "%13")
FA_WGMMA_FP8(32, "%16", "%17", "%18", "%19", "%20", "%21")
FA_WGMMA_FP8(64, "%32", "%33", "%34", "%35", "%36", "%37")
FA_WGMMA_FP8(80, "%40", "%41", "%42", "%43", "%44", "%45")
FA_WGMMA_FP8(96, "%48", "%49", "%50", "%51", "%52", "%53")
FA_WGMMA_FP8(112, "%56", "%57", "%58", "%59", "%60", "%61")
FA_WGMMA_FP8(128, "%64", "%65", "%66", "%67", "%68", "%69")
FA_WGMMA_FP8(160, "%80", "%81", "%82", "%83", "%84", "%85")
FA_WGMMA_FP8(192, "%96", "%97", "%98", "%99", "%100", "%101")
FA_WGMMA_FP8(224, "%112", "%113", "%114", "%115", "%116", "%117")
FA_WGMMA_FP8(256, "%128", "%129", "%130", "%131", "%132", "%133")

// int8: the same bytes, in sums that are exact. The lists of accumulators are now of integer registers.
#undef FA_ACC
#define FA_ACC(i) "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])
#define FA_WGMMA_INT8(N, P0, P1, P2)                                                                                \
  template <>                                                                                                       \
  struct Wgmma<int8_t, N> {                                                                                         \
    __device__ __forceinline__ static void ss(int32_t (&d)[N / 8][4], uint64_t a, uint64_t b, int scale_d) {        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                           \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" FA_REGS##N "}, " P0 ", " P1 ", p;\n}\n" \
                   : FA_ACCS##N                                                                                     \
                   : "l"(a), "l"(b), "r"(scale_d));                                                                 \
    }                                                                                                               \
  };
FA_WGMMA_INT8(8, "%4", "%5", "%6")
FA_WGMMA_INT8(16, "%8", "%9", "%10")
FA_WGMMA_INT8(32, "%16", "%17", "%18")
FA_WGMMA_INT8(64, "%32", "%33", "%34")
FA_WGMMA_INT8(96, "%48", "%49", "%50")
FA_WGMMA_INT8(112, "%56", "%57", "%58")
FA_WGMMA_INT8(128, "%64", "%65", "%66")
FA_WGMMA_INT8(160, "%80", "%81", "%82")
FA_WGMMA_INT8(192, "%96", "%97", "%98")
FA_WGMMA_INT8(224, "%112", "%113", "%114")
FA_WGMMA_INT8(256, "%128", "%129", "%130")

#undef FA_WGMMA_INT8
#undef FA_WGMMA_FP8
#undef FA_WGMMA_BOTH
#undef FA_WGMMA

}  // namespace fastattn
