// Weights of 4 bits on their way to wgmma's left operand: a type for each format, which the types of
// gemm_sm90_w4_operands.cuh have as theirs.
//
// Of the eight codes of a word, neighbouring columns of a row, lane 4 g + t needs byte t: columns 2 t and 2 t + 1, a
// register of the fragment. One byte permute of the word and the same shifted by 4 bits brings the two codes to the
// register's halves; from there it is as in arch/e2m1.cuh.
//
// Each type has
//   T            what scales become, and weights, unless those become e4m3
//   kSpan        columns that share a scale, as far as the kernel knows
//   kSumFactor   by which sums of the products are too small
//   kHasGlobalScale   whether a row's sums may be divided by a number
//   Raw, load    what memory has for 64 columns of a row
//   kLine        columns whose scales are 128 bytes, at most
//   kLoad        of how many columns, all of them in the row, `load` is sure to read
//   address      where those of a column are
//   Scales, of   span `idx` of that for two rows, as T in the low and in the high half
//   weight       two weights of the lower (HALF 0) or the upper row; select: `byte_selector` of the lane
#pragma once

#include "arch/e2m1.cuh"
#include "arch/e4m3.cuh"
#include "arch/fragments.cuh"
#include "arch/global_memory.cuh"
#include "arch/vec.cuh"
#include "gemm/gemm_sm90_w4.h"

namespace fastattn {

// Byte lane % 4 of the first source for the register's lower half, of the second for the upper one, twice each.
__device__ __forceinline__ uint32_t byte_selector(int lane) { return 0x4400u + lane % 4 * 0x1111u; }

template <int HALF, typename T>
__device__ __forceinline__ Pair<T> half_of(uint32_t pair) {
  return both<T>(HALF == 0 ? as_pair<T>(pair).x : as_pair<T>(pair).y);
}

template <typename T>
constexpr bool kIsHalf = kUint4Base<T> == 1024;

// The codes of byte lane % 4 as numbers times 2^-126 (bf16) or 2^-14 (fp16): each is in the upper half of a byte, from
// where its sign is taken, and of the one below it, from where exponent and mantissa go up, as a multiplication does
// it.
template <typename T>
__device__ __forceinline__ Pair<T> small_e2m1_pair(uint32_t word, uint32_t select) {
  const uint32_t codes = __byte_perm(word << 4, word, select);
  constexpr uint32_t kNumber = kIsHalf<T> ? 0x0e000e00u : 0x01c001c0u;
  return as_pair<T>((codes & 0x80008000u) | (codes << (kIsHalf<T> ? 5 : 2) & kNumber));
}

// A scale, which is at most 448, times 2^119 (fp16: 2^7) still is a number of T, and takes the 2^-126 (2^-14) along:
// the product, of 6 significant bits, is 2^-7 of the weight, and exact.
template <typename Element>
struct Nvfp4Sm90 {
  using T = Element;
  static constexpr int kSpan = 16, kLine = 128 * 16, kLoad = 64;
  static constexpr float kSumFactor = 128.0f;
  static constexpr bool kHasGlobalScale = true;
  static constexpr float kScaleFactor = kIsHalf<T> ? 0x1p7f : 0x1p119f;
  using Raw = uint32_t;
  using Scales = uint32_t;

  __device__ static __forceinline__ const uint8_t* address(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return static_cast<const uint8_t*>(p.weight_scale) + row * p.scale_stride + column / 16;
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return __ldg(reinterpret_cast<const uint32_t*>(address(p, row, column)));
  }
  __device__ static __forceinline__ Scales of(Raw low, Raw high, int idx) {
    uint32_t pairs[2][2];
    unpack_e4m3(pairs[0], low);
    unpack_e4m3(pairs[1], high);
    float scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 two = unpack_pair<__half>(pairs[i][idx / 2]);
      scales[i] = (idx % 2 == 0 ? two.x : two.y) * kScaleFactor;
    }
    return pack_pair<T>(scales[0], scales[1]);
  }
  template <int HALF>
  __device__ static __forceinline__ Pair<T> weight(uint32_t word, uint32_t select, Scales scales) {
    return __hmul2(small_e2m1_pair<T>(word, select), half_of<HALF, T>(scales));
  }
};

// Scales have all of fp32's range, so that no factor can be given to them.
template <typename Element>
struct Mxfp4Sm90 {
  using T = Element;
  static constexpr int kSpan = 32, kLine = 128 * 32, kLoad = 64;
  static constexpr float kSumFactor = 1.0f;
  static constexpr bool kHasGlobalScale = true;
  static constexpr uint32_t kFactor = kIsHalf<T> ? 0x74007400u : 0x7e807e80u;  // 2^14, 2^126
  using Raw = uint16_t;
  using Scales = uint32_t;

  __device__ static __forceinline__ const uint8_t* address(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return static_cast<const uint8_t*>(p.weight_scale) + row * p.scale_stride + column / 32;
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return __ldg(reinterpret_cast<const uint16_t*>(address(p, row, column)));
  }
  __device__ static __forceinline__ Scales of(Raw low, Raw high, int idx) {
    return pack_pair<T>(from_e8m0<float>(static_cast<uint8_t>(low >> 8 * idx)),
                        from_e8m0<float>(static_cast<uint8_t>(high >> 8 * idx)));
  }
  template <int HALF>
  __device__ static __forceinline__ Pair<T> weight(uint32_t word, uint32_t select, Scales scales) {
    return __hmul2(__hmul2(small_e2m1_pair<T>(word, select), as_pair<T>(kFactor)), half_of<HALF, T>(scales));
  }
};

// A code in the upper half of a byte. In fp16 these are bits of the mantissa of 64, and 64 + code comes of it; in bf16
// they would not fit there, but are the number code * 2^-129, which 2^127 makes a quarter of the code; the scale, which
// must be below 2^126, makes up for it. The difference is exact, the product rounds once.
template <typename Element>
struct Int4Sm90 {
  using T = Element;
  static constexpr int kSpan = 64, kLine = 64 * 64, kLoad = 64;
  static constexpr float kSumFactor = 1.0f;
  static constexpr bool kHasGlobalScale = false;
  struct Raw {
    T scale;
    int8_t zero_point;
  };
  struct Scales {
    uint32_t scale;
    uint32_t zero;
  };

  __device__ static __forceinline__ const T* address(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return static_cast<const T*>(p.weight_scale) + row * p.scale_stride + p.group_size.divide(column);
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    const int64_t zero_idx = row * p.zero_point_stride + p.group_size.divide(column);
    return {*address(p, row, column), p.zero_point != nullptr ? p.zero_point[zero_idx] : int8_t{0}};
  }
  __device__ static __forceinline__ Scales of(const Raw& low, const Raw& high, int) {
    const float zeros[2] = {8.0f + low.zero_point, 8.0f + high.zero_point};
    if constexpr (kIsHalf<T>) {
      return {bits_of<T>(Pair<T>(low.scale, high.scale)), pack_pair<T>(64.0f + zeros[0], 64.0f + zeros[1])};
    } else {
      return {pack_pair<T>(4.0f * to_float(low.scale), 4.0f * to_float(high.scale)),
              pack_pair<T>(-0.25f * zeros[0], -0.25f * zeros[1])};
    }
  }
  template <int HALF>
  __device__ static __forceinline__ Pair<T> weight(uint32_t word, uint32_t select, const Scales& scales) {
    return number<HALF>(__byte_perm(word << 4, word, select) & 0x00f000f0u, scales);
  }
  // Of codes in bits 4 to 7 of either half.
  template <int HALF>
  __device__ static __forceinline__ Pair<T> number(uint32_t codes, const Scales& scales) {
    const Pair<T> zero = half_of<HALF, T>(scales.zero);
    if constexpr (kIsHalf<T>) {
      return __hmul2(__hsub2(as_pair<T>(codes | 0x54005400u), zero), half_of<HALF, T>(scales.scale));
    } else {
      return __hmul2(__hfma2(as_pair<T>(codes), as_pair<T>(0x7f007f00u), zero), half_of<HALF, T>(scales.scale));
    }
  }
};

// Scales of weights that become e4m3: for each row all magnitudes times the scale, so that of a code's three lower bits
// one permute makes a weight. K is a multiple of 32.
struct Fp8Magnitudes {
  uint2 low, high;  // 0, 0.5, 1, 1.5 and 2, 3, 4, 6, a byte each
};

// A product of fp16 is exact, so that each rounds once.
__device__ __forceinline__ uint2 magnitudes_times(__half scale) {
  const Pair<__half> two = both<__half>(scale);
  const auto times = [&](uint32_t pair) { return bits_of<__half>(__hmul2(two, as_pair<__half>(pair))); };
  return {pack_e4m3_pairs(times(0x38000000u), times(0x3e003c00u)),
          pack_e4m3_pairs(times(0x42004000u), times(0x46004400u))};
}

// `column`, too: of the 64 columns there may be the first 32 only.
__device__ __forceinline__ int32_t second_half_of(const GemmSm90W4Params& p, int32_t column) {
  return min(column + 32, static_cast<int32_t>(p.k) - 32);
}

struct Nvfp4ToFp8Sm90 {
  static constexpr int kSpan = 16, kLine = 128 * 16, kLoad = 32;
  using Raw = uint32_t;
  using Scales = Fp8Magnitudes;

  __device__ static __forceinline__ const uint8_t* address(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return static_cast<const uint8_t*>(p.weight_scale) + row * p.scale_stride + column / 16;
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    const Raw low = __ldg(reinterpret_cast<const uint16_t*>(address(p, row, column)));
    return low | Raw{__ldg(reinterpret_cast<const uint16_t*>(address(p, row, second_half_of(p, column))))} << 16;
  }
  __device__ static __forceinline__ Scales of(Raw low, Raw high, int idx) {
    uint32_t pairs[2][2];
    unpack_e4m3(pairs[0], low);
    unpack_e4m3(pairs[1], high);
    const uint32_t scales = __byte_perm(pairs[0][idx / 2], pairs[1][idx / 2], idx % 2 == 0 ? 0x5410 : 0x7632);
    const Pair<__half> eighths = __hmul2(as_pair<__half>(scales), as_pair<__half>(0x30003000u));
    return {magnitudes_times(eighths.x), magnitudes_times(eighths.y)};
  }
};

struct Mxfp4ToFp8Sm90 {
  static constexpr int kSpan = 32, kLine = 128 * 32, kLoad = 32;
  struct Raw {
    uint8_t scales[2], largest;
  };
  using Scales = Fp8Magnitudes;

  __device__ static __forceinline__ const uint8_t* address(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return static_cast<const uint8_t*>(p.weight_scale) + row * p.scale_stride + column / 32;
  }
  __device__ static __forceinline__ Raw load(const GemmSm90W4Params& p, int64_t row, int32_t column) {
    return {{__ldg(address(p, row, column)), __ldg(address(p, row, second_half_of(p, column)))}, p.row_exponent[row]};
  }
  __device__ static __forceinline__ Scales of(const Raw& low, const Raw& high, int idx) {
    return {magnitudes_times(scale(low, idx)), magnitudes_times(scale(high, idx))};
  }

 private:
  // Below fp16's normal numbers nothing is left of it in e4m3.
  __device__ static __forceinline__ __half scale(const Raw& raw, int idx) {
    const int bits = raw.scales[idx];
    return as_pair<__half>(bits == 255 ? 0x7e00u : static_cast<uint32_t>(max(bits - raw.largest + 6 + 15, 0)) << 10).x;
  }
};

__device__ __forceinline__ uint32_t shuffle_scales(uint32_t scales, int lane) {
  return __shfl_sync(0xffffffffu, scales, lane);
}
__device__ __forceinline__ uint2 shuffle_scales(const uint2& scales, int lane) {
  return {shuffle_scales(scales.x, lane), shuffle_scales(scales.y, lane)};
}
__device__ __forceinline__ Fp8Magnitudes shuffle_scales(const Fp8Magnitudes& scales, int lane) {
  return {shuffle_scales(scales.low, lane), shuffle_scales(scales.high, lane)};
}
template <typename Scales>
__device__ __forceinline__ Scales shuffle_scales(const Scales& scales, int lane) {
  return {shuffle_scales(scales.scale, lane), shuffle_scales(scales.zero, lane)};
}

// The scales of a lane's two rows, 8 apart, in a stage. Each of the four lanes of a row loads those of 64 columns, one
// stage ahead, makes T of them, and hands them on. Past the end of a row or of the matrix the last ones that there are
// stand in: x is zero there, or the result is not stored.
template <typename Format>
struct GemmSm90W4Scales {
  static constexpr int kOwn = 64 / Format::kSpan;
  typename Format::Raw next[2];
  typename Format::Scales own[kOwn];

  // Asks for the scales of steps as far as the L2 cache, which is in order even before the kernel in front has ended.
  __device__ __forceinline__ static void prefetch(const GemmSm90W4Params& p, int32_t row, int32_t begin_step,
                                                  int32_t end_step, int lane) {
    const int64_t end = min(int64_t{end_step} * kGemmSm90W4StageK, p.k);
#pragma unroll 1
    for (int64_t column = int64_t{begin_step} * kGemmSm90W4StageK + lane % 4 * Format::kLine; column < end;
         column += 4 * Format::kLine) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t scale_row = min(row + i * 8, static_cast<int32_t>(p.n) - 1);
        prefetch_l2(Format::address(p, scale_row, static_cast<int32_t>(column)));
      }
    }
  }
  __device__ __forceinline__ void load(const GemmSm90W4Params& p, int32_t row, int32_t step, int lane) {
    const int32_t column = min(step * kGemmSm90W4StageK + lane % 4 * 64, static_cast<int32_t>(p.k) - Format::kLoad);
#pragma unroll
    for (int i = 0; i < 2; ++i) next[i] = Format::load(p, min(row + i * 8, static_cast<int32_t>(p.n) - 1), column);
  }
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i] = Format::of(next[0], next[1], i);
  }
  // Of a stage's columns `column` and on.
  __device__ __forceinline__ typename Format::Scales at(int column, int lane) const {
    return shuffle_scales(own[column % 64 / Format::kSpan], (lane & 28) | column / 64);
  }
};

}  // namespace fastattn
