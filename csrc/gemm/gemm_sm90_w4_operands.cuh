// What the kernel for many rows makes of weights of 4 bits, in shared memory: a type for each kind, the template
// argument of gemm_sm90_w4_many_rows.cuh.
//
//   kind                       x      weight in shared memory                        out
//   GemmSm90W4A16<Format>      T      T, as Format has it                            sum * kSumFactor / global_scale +
//   bias GemmSm90W4A8 of NVFP4      e4m3   e4m3(E2M1 * scale / 8)                         sum * x_scale * (8 /
//   global_scale) + bias GemmSm90W4A8 of MXFP4      e4m3   e4m3(E2M1 * 2^(6 + scale - largest of a row))  the same with
//   2^(largest - 6)
//
// Each type has
//   Element, Out   the elements of x and of the weight in shared memory, of out and bias
//   kDType         the former's
//   kTwoLevels     as in gemm_sm90_operands.cuh
//   kColumns       columns of 32 bytes of a row, a quarter of a panel: what a lane makes
//   Codes          as many codes
//   Row, row_of    what a lane knows of a row of weight
//   Raw, load      what memory has as scales of those columns
//   make           two chunks of 16 bytes
//   kScaled …       as in gemm_sm90_operands.cuh
#pragma once

#include "gemm/gemm_sm90_operands.cuh"
#include "gemm/gemm_sm90_w4_formats.cuh"

namespace fastattn {

template <typename Format>
struct GemmSm90W4A16 {
  using Element = typename Format::T;
  using Out = Element;
  static constexpr DType kDType = GemmSm90Dense<Element>::kDType;
  static constexpr bool kTwoLevels = false;
  static constexpr int kColumns = 16;
  using Codes = uint2;
  using Raw = typename Format::Raw;

  struct Row {};
  __device__ static __forceinline__ Row row_of(const GemmSm90W4Params&, int64_t) { return {}; }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return Format::load(p, row, column / 64 * 64);
  }
  __device__ static __forceinline__ void make(uint4 (&chunks)[2], const Codes& codes, Raw raw, Row, int quarter) {
    if constexpr (Format::kSpan < 64) raw >>= 8 * (quarter * kColumns / Format::kSpan);  // a byte each
    const typename Format::Scales scales = Format::of(raw, raw, 0);
    chunks[0] = eight(codes.x, scales);
    chunks[1] = eight(codes.y, scales);
  }

  static constexpr bool kScaled = Format::kHasGlobalScale;
  static constexpr GemmSm90Norm kNorm = GemmSm90Norm::kNone;
  __device__ static __forceinline__ float row_scale(const GemmSm90W4Params&, int64_t) { return 1.0f; }
  __device__ static __forceinline__ const float* column_factors(const GemmSm90W4Params& p) { return p.global_scale; }
  __device__ static __forceinline__ int64_t column_stride(const GemmSm90W4Params&) { return 1; }
  __device__ static __forceinline__ float column_factor(const GemmSm90W4Params& p, float stored) {
    return p.global_scale == nullptr ? Format::kSumFactor : Format::kSumFactor / stored;
  }

 private:
  __device__ static __forceinline__ uint4 eight(uint32_t word, const typename Format::Scales& scales) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = bits_of<Element>(Format::template weight<0>(word, byte_selector(i), scales));
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
};

// The eight magnitudes of E2M1 times a scale, as e4m3: the bytes that codes look up.
__device__ __forceinline__ uint2 e4m3_table(Pair<__half> scale) {
  constexpr uint32_t kMagnitudes[] = {0x38000000u, 0x3e003c00u, 0x42004000u,
                                      0x46004400u};  // 0, 0.5; 1, 1.5; 2, 3; 4, 6
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = bits_of<__half>(__hmul2(as_pair<__half>(kMagnitudes[i]), scale));
  return make_uint2(pack_e4m3_pairs(pairs[0], pairs[1]), pack_e4m3_pairs(pairs[2], pairs[3]));
}

// The eight codes of a word, whose signs are the upper bits of their halves of a byte.
__device__ __forceinline__ uint2 look_up(uint32_t word, uint2 table) {
  const uint32_t magnitudes = word & 0x77777777u;
  const uint32_t low = __byte_perm(table.x, table.y, magnitudes);
  const uint32_t high = __byte_perm(table.x, table.y, magnitudes >> 16);
  const uint32_t low_signs = __byte_perm(word << 4, word, 0x5140), high_signs = __byte_perm(word << 4, word, 0x7362);
  return make_uint2(low ^ (low_signs & 0x80808080u), high ^ (high_signs & 0x80808080u));
}

// With x in e4m3. GROUP: 16 is NVFP4, 32 is MXFP4. A weight is rounded once: its product with the scale is exact in
// fp16. Scales of MXFP4 are relative to the row's largest (row_exponent), which is brought to 2^6, so that 6 * 2^6
// fits: exact down to 2^-8, fourteen powers of two below. Those of NVFP4 are at most 448, and 6 * 448 / 8 fits.
template <typename T, int GROUP, bool FAST_ACCUM>
struct GemmSm90W4A8 {
  static_assert(GROUP == 16 || GROUP == 32);
  using Element = __nv_fp8_e4m3;
  using Out = T;
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr bool kTwoLevels = !FAST_ACCUM;
  static constexpr int kColumns = 32;
  using Codes = uint4;
  using Raw = std::conditional_t<GROUP == 16, uint16_t, uint8_t>;

  struct Row {
    int largest;  // MXFP4: of its scales, as they are stored
  };
  __device__ static __forceinline__ Row row_of(const GemmSm90W4Params& p, int64_t row) {
    return {GROUP == 16 ? 0 : p.row_exponent[row]};
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    const uint8_t* const scales = static_cast<const uint8_t*>(p.weight_scale) + row * p.scale_stride;
    return __ldg(reinterpret_cast<const Raw*>(scales + column / GROUP));
  }
  __device__ static __forceinline__ void make(uint4 (&chunks)[2], const Codes& codes, Raw raw, Row row, int) {
    uint2 tables[2];
    if constexpr (GROUP == 16) {
      uint32_t pairs[2];
      unpack_e4m3(pairs, raw);
      const Pair<__half> scales = __hmul2(as_pair<__half>(pairs[0]), as_pair<__half>(0x30003000u));  // 1 / 8
      tables[0] = e4m3_table(both<__half>(scales.x));
      tables[1] = e4m3_table(both<__half>(scales.y));
    } else {
      // Below fp16's normal numbers nothing is left of it in e4m3.
      const uint32_t bits = raw == 255 ? 0x7e00u : static_cast<uint32_t>(max(raw - row.largest + 6 + 15, 0)) << 10;
      tables[0] = tables[1] = e4m3_table(as_pair<__half>(bits | bits << 16));
    }
    const uint2 words[4] = {look_up(codes.x, tables[0]), look_up(codes.y, tables[0]), look_up(codes.z, tables[1]),
                            look_up(codes.w, tables[1])};
    chunks[0] = make_uint4(words[0].x, words[0].y, words[1].x, words[1].y);
    chunks[1] = make_uint4(words[2].x, words[2].y, words[3].x, words[3].y);
  }

  static constexpr bool kScaled = true;
  static constexpr GemmSm90Norm kNorm = GemmSm90Norm::kNone;
  __device__ static __forceinline__ float row_scale(const GemmSm90W4Params& p, int64_t row) {
    return __ldg(p.x_scale + row * p.x_scale_stride);
  }
  __device__ static __forceinline__ const float* column_factors(const GemmSm90W4Params& p) {
    return GROUP == 16 ? p.global_scale : p.row_scale;
  }
  __device__ static __forceinline__ int64_t column_stride(const GemmSm90W4Params&) { return 1; }
  __device__ static __forceinline__ float column_factor(const GemmSm90W4Params& p, float stored) {
    return GROUP == 32 ? stored : p.global_scale == nullptr ? 8.0f : 8.0f / stored;
  }
};

}  // namespace fastattn
