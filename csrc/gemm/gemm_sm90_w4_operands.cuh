// What the tensor cores multiply in the Hopper GEMM for weights of 4 bits as checkpoints have them: a type for each
// kind, the template argument of gemm_sm90_w4_products.cuh and gemm_sm90_w4.cuh.
//
//   kind                    x      A fragment                                     sums are multiplied by
//   GemmSm90W4A16<Format>   T      T, as Format has it                            kSumFactor / global_scale
//   GemmSm90W4A8 of NVFP4   e4m3   e4m3(E2M1 * scale / 8)                         x_scale * 8 / global_scale
//   GemmSm90W4A8 of MXFP4   e4m3   e4m3(E2M1 * 2^(6 + scale - largest of a row))  x_scale * 2^(largest - 133) / it
//
// Each type has
//   Element, Out    the elements of x, of out and bias
//   kDType          the former's
//   Format          scales, as in gemm_sm90_w4_formats.cuh
//   Codes, load     what a lane takes of 32 columns of its two rows, 8 apart, the first one's at `address`
//   make_fragment   of product 0 or 1 of two, whose columns begin with `column` of the stage
//   x_scale         of a row of x
//   column_factor   of a row of weight: what its sums are multiplied by
#pragma once

#include "arch/dtype.h"
#include "gemm/gemm_sm90_operands.cuh"
#include "gemm/gemm_sm90_w4_formats.cuh"

namespace fastattn {

template <typename FormatOfWeight>
struct GemmSm90W4A16 {
  using Format = FormatOfWeight;
  using Element = typename Format::T;
  using Out = Element;
  static constexpr DType kDType = GemmSm90Dense<Element>::kDType;

  struct Codes {
    uint4 low, high;
  };

  __device__ static __forceinline__ Codes load(uint32_t address, int) {
    return {load_shared_16_bytes(address), load_shared_16_bytes(address + 8 * 128)};
  }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], const Codes& codes, int product,
                                                       const GemmSm90W4Scales<Format>& of_stage, int column, int lane) {
    const typename Format::Scales scales = of_stage.at(column, lane);
    const uint32_t select = byte_selector(lane);
    const uint4 &low = codes.low, &high = codes.high;
    a[0] = bits_of<Element>(Format::template weight<0>(product == 0 ? low.x : low.z, select, scales));
    a[1] = bits_of<Element>(Format::template weight<1>(product == 0 ? high.x : high.z, select, scales));
    a[2] = bits_of<Element>(Format::template weight<0>(product == 0 ? low.y : low.w, select, scales));
    a[3] = bits_of<Element>(Format::template weight<1>(product == 0 ? high.y : high.w, select, scales));
  }

  __device__ static __forceinline__ float x_scale(const GemmSm90W4Params&, int64_t) { return 1.0f; }
  __device__ static __forceinline__ float column_factor(const GemmSm90W4Params& p, int64_t row) {
    const bool divides = Format::kHasGlobalScale && p.global_scale != nullptr;
    return divides ? Format::kSumFactor / __ldg(p.global_scale + row) : Format::kSumFactor;
  }
};

// With x in e4m3. GROUP: 16 is NVFP4, 32 is MXFP4. A weight is rounded once: its product with the scale is exact in
// fp16. Scales of MXFP4 are relative to the row's largest (row_exponent), which is brought to 2^6, so that 6 * 2^6
// fits: exact down to 2^-8, fourteen powers of two below. Those of NVFP4 are at most 448, and 6 * 448 / 8 fits.
template <typename T, int GROUP>
struct GemmSm90W4A8 {
  static_assert(GROUP == 16 || GROUP == 32);
  using Format = std::conditional_t<GROUP == 16, Nvfp4ToFp8Sm90, Mxfp4ToFp8Sm90>;
  using Element = __nv_fp8_e4m3;
  using Out = T;
  static constexpr DType kDType = DType::kFloat8E4M3;

  // Of 16 columns lane 4 g + t has 4, bytes 2 t and 2 t + 1 of eight.
  struct Codes {
    uint32_t low[2], high[2];
  };

  __device__ static __forceinline__ Codes load(uint32_t address, int lane) {
    const uint32_t own = address + lane % 4 * 2;
    return {{load_shared_2_bytes(own), load_shared_2_bytes(own + 8)},
            {load_shared_2_bytes(own + 8 * 128), load_shared_2_bytes(own + 8 * 128 + 8)}};
  }
  __device__ static __forceinline__ void make_fragment(uint32_t (&a)[4], const Codes& codes, int,
                                                       const GemmSm90W4Scales<Format>& of_stage, int column, int lane) {
    typename Format::Scales first = of_stage.at(column, lane), second = first;
    if constexpr (GROUP == 16) second = of_stage.at(column + 16, lane);
    a[0] = four(codes.low[0], first.low);
    a[1] = four(codes.high[0], first.high);
    a[2] = four(codes.low[1], second.low);
    a[3] = four(codes.high[1], second.high);
  }

  __device__ static __forceinline__ float x_scale(const GemmSm90W4Params& p, int64_t row) {
    return p.x_scale[row * p.x_scale_stride];
  }
  __device__ static __forceinline__ float column_factor(const GemmSm90W4Params& p, int64_t row) {
    if constexpr (GROUP == 32) {
      return p.row_scale[row];
    } else {
      return p.global_scale == nullptr ? 8.0f : 8.0f / __ldg(p.global_scale + row);
    }
  }

 private:
  // A byte permute looks up four magnitudes; signs, the upper bits of halves of a byte, are put on top.
  __device__ static __forceinline__ uint32_t four(uint32_t codes, const uint2& magnitudes) {
    const uint32_t signs = __byte_perm(codes << 4, codes, 0x5140);
    return __byte_perm(magnitudes.x, magnitudes.y, codes & 0x7777u) ^ (signs & 0x80808080u);
  }
};

}  // namespace fastattn
