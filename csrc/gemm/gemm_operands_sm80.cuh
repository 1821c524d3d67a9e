// What the operands of the sm_80 GEMM are made of: a type for each kind, the template argument of the mainloop.
//
//   kind            x        weight                   a fragment of weight             sum     out
//   DenseOperands   T        T                        ldmatrix                         fp32    sum + bias
//   Int8Operands    int8     int8                     ldmatrix                         int32   sum * scales + bias
//   Fp8Operands     e4m3     e4m3                     ldmatrix, then fp16              fp32    sum * scales + bias
//   Fp8BlockOperands   e4m3  e4m3                     the plain kernel only            fp32    sum + bias
//   Int4Operands    T        u4, 2 in a byte          bytes, (u - 8 - zero) * scale    fp32    sum + bias
//   Nvfp4Operands   T        E2M1, 2 in a byte        bytes, value * scale             fp32    sum / global_scale +
//   bias Mxfp4Operands   the same with other scales
//
// The mainloop sees K in pieces of 16 bytes and steps of 32 bytes of x. Two int8 are as wide as one T, and mma.m16n8k32
// for int8 lays its fragments out in bytes as mma.m16n8k16 does for T: so int8 differs from T in the instruction only.
//
// Four-bit weights become T in registers, (value * scale) rounded to T. What a lane needs of a row in a step of 16
// columns:
//
//   columns    0 1   2 3   4 5   6 7 | 8 9  10 11 12 13 14 15        b0: columns 2t, 2t + 1 = byte t of the low word
//   bytes      [0]   [1]   [2]   [3] | [4]   [5]   [6]   [7]         b1: columns 2t + 8, 9  = byte t of the high word
//
// The four lanes t of a row read the same 8 bytes, which shared memory gives to all of them at once.
//
// Each type has
//   X, Out, Acc       the elements of x and out, and what sums are kept in
//   kWeightBits       bits of K's columns in a weight row
//   Scales            what belongs to a lane's rows of weight in one step: loaded a step ahead, kept in registers
//   load_weight       two fragments (8 rows each) of weight from shared memory
//   mma               one tensor-core instruction
//   Row, Column       what the epilogue multiplies and adds
//   x_value, weight_value   one element, for the plain kernel
#pragma once

#include <cuda_fp8.h>

#include "arch/e2m1.cuh"
#include "arch/e4m3.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/swizzle.cuh"
#include "arch/vec.cuh"
#include "gemm/gemm_sm80.h"

namespace fastattn {

// ---------------------------------------------------------------------------------------------
// Pieces that several kinds share

struct NoScales {
  __device__ __forceinline__ void load(const GemmSm80Params&, int64_t, int64_t) {}
};

struct NoRow {
  __device__ __forceinline__ NoRow(const GemmSm80Params&, int64_t) {}
};

template <typename T>
struct BiasColumn {
  float bias;

  __device__ __forceinline__ BiasColumn(const GemmSm80Params& p, int64_t column)
      : bias(p.bias != nullptr && column < p.n ? to_float(static_cast<const T*>(p.bias)[column]) : 0.0f) {}
  __device__ __forceinline__ float apply(float sum, NoRow) const { return sum + bias; }
};

// Rows of 16-bit units, or of pairs of int8, whose fragments ldmatrix makes.
template <int COLS>
__device__ __forceinline__ void load_weight_matrix(uint32_t (&frag)[4], const uint16_t* tile, int first_row, int kk) {
  const int lane = threadIdx.x % 32;
  const int row = first_row + (lane & 7) + (lane >> 4) * 8;
  ldmatrix_x4(frag, tile + swizzled<COLS>(row, kk * 2 + ((lane >> 3) & 1)));
}

// The byte with this lane's two columns, of the low and of the high word of 16 columns.
struct CodeBytes {
  uint32_t low, high;
};

template <int COLS>
__device__ __forceinline__ CodeBytes load_codes(const uint16_t* tile, int row, int kk) {
  // 16 columns are 8 bytes, half a chunk.
  const uint16_t* const source = tile + swizzled<COLS>(row, kk / 2) + kk % 2 * 4;
  const uint2 words = *reinterpret_cast<const uint2*>(source);
  const int shift = threadIdx.x % 4 * 8;
  return {words.x >> shift & 0xff, words.y >> shift & 0xff};
}

// ---------------------------------------------------------------------------------------------

template <typename T>
struct DenseOperands {
  using X = T;
  using Out = T;
  using Acc = float;
  static constexpr int kWeightBits = 16;
  using Row = NoRow;
  using Column = BiasColumn<T>;
  template <int N_FRAGS, int K16_STEPS>
  using Scales = NoScales;

  template <int COLS, typename S>
  __device__ static __forceinline__ void load_weight(uint32_t (&frag)[4], const uint16_t* tile, int first_row, int nn,
                                                     int kk, const S&) {
    load_weight_matrix<COLS>(frag, tile, first_row + nn * 16, kk);
  }
  __device__ static __forceinline__ void mma(float (&acc)[4], const uint32_t (&x)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(acc, x, b0, b1);
  }
  __device__ static __forceinline__ float x_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return to_float(static_cast<const T*>(p.x)[row * p.x_stride + column]);
  }
  __device__ static __forceinline__ float weight_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return to_float(static_cast<const T*>(p.weight)[row * p.weight_stride + column]);
  }
};

// ---------------------------------------------------------------------------------------------

template <typename T>
struct Int8Operands {
  using X = int8_t;
  using Out = T;
  using Acc = int32_t;
  static constexpr int kWeightBits = 8;
  template <int N_FRAGS, int K16_STEPS>
  using Scales = NoScales;

  struct Row {
    float scale;
    int32_t zero_point;
    __device__ __forceinline__ Row(const GemmSm80Params& p, int64_t row)
        : scale(p.x_scale[row * p.x_scale_stride]),
          zero_point(p.x_zero_point != nullptr ? p.x_zero_point[row * p.x_scale_stride] : 0) {}
  };
  struct Column {
    float scale;
    int32_t code_sum;
    float bias;
    __device__ __forceinline__ Column(const GemmSm80Params& p, int64_t column)
        : scale(column < p.n ? static_cast<const float*>(p.weight_scale)[column * p.weight_scale_stride] : 0.0f),
          code_sum(p.x_zero_point != nullptr && column < p.n ? p.weight_code_sum[column] : 0),
          bias(BiasColumn<T>(p, column).bias) {}
    __device__ __forceinline__ float apply(int32_t sum, const Row& row) const {
      return static_cast<float>(sum - row.zero_point * code_sum) * (row.scale * scale) + bias;
    }
  };

  template <int COLS, typename S>
  __device__ static __forceinline__ void load_weight(uint32_t (&frag)[4], const uint16_t* tile, int first_row, int nn,
                                                     int kk, const S&) {
    load_weight_matrix<COLS>(frag, tile, first_row + nn * 16, kk);
  }
  __device__ static __forceinline__ void mma(int32_t (&acc)[4], const uint32_t (&x)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k32_s8(acc, x, b0, b1);
  }
  __device__ static __forceinline__ int32_t x_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return static_cast<const int8_t*>(p.x)[row * p.x_stride + column];
  }
  __device__ static __forceinline__ int32_t weight_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return static_cast<const int8_t*>(p.weight)[row * p.weight_stride + column];
  }
};

// ---------------------------------------------------------------------------------------------

// Fragments as int8's. Four bytes of e4m3 become four fp16 values, two of one product and two of another: which columns
// of K a product takes is free, so long as x and weight agree.
template <typename T>
struct Fp8Operands : Int8Operands<T> {
  using X = __nv_fp8_e4m3;
  using Acc = float;
  using Row = typename Int8Operands<T>::Row;

  struct Column : Int8Operands<T>::Column {
    using Int8Operands<T>::Column::Column;
    __device__ __forceinline__ float apply(float sum, const Row& row) const {
      return sum * (row.scale * this->scale) + this->bias;
    }
  };

  __device__ static __forceinline__ void mma(float (&acc)[4], const uint32_t (&x)[4], uint32_t b0, uint32_t b1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of 32 columns
      uint32_t rows[2][2], weight[2];
      unpack_e4m3(rows[0], x[2 * half]);
      unpack_e4m3(rows[1], x[2 * half + 1]);
      unpack_e4m3(weight, half == 0 ? b0 : b1);
      const uint32_t fragment[4] = {rows[0][0], rows[1][0], rows[0][1], rows[1][1]};
      mma_m16n8k16<__half>(acc, fragment, weight[0], weight[1]);
    }
  }
  __device__ static __forceinline__ float x_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return static_cast<float>(static_cast<const X*>(p.x)[row * p.x_stride + column]);
  }
  __device__ static __forceinline__ float weight_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return static_cast<float>(static_cast<const X*>(p.weight)[row * p.weight_stride + column]);
  }
};

// Elements times their scales, for the plain kernel.
template <typename T>
struct Fp8BlockOperands {
  static constexpr int64_t kBlock = 128;
  using Out = T;
  using Acc = float;
  using Row = NoRow;
  using Column = BiasColumn<T>;

  __device__ static __forceinline__ float x_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return Fp8Operands<T>::x_value(p, row, column) * p.x_scale[column / kBlock * p.x_scale_stride + row];
  }
  __device__ static __forceinline__ float weight_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    const float* const scales = static_cast<const float*>(p.weight_scale) + row / kBlock * p.weight_scale_stride;
    return Fp8Operands<T>::weight_value(p, row, column) * scales[column / kBlock];
  }
};

// ---------------------------------------------------------------------------------------------

// Rows of weight that a lane dequantizes: row lane / 4 of each of its N_FRAGS fragments. Past the end of a row or of
// the matrix the last scale that there is stands in: x is zero there, or the result is not stored.
template <typename Scale, int N_FRAGS, int K16_STEPS, int SPAN>
struct GroupScales {
  static_assert(K16_STEPS * 16 % SPAN == 0, "a step is made of whole spans");
  Scale values[N_FRAGS][K16_STEPS * 16 / SPAN];

  __device__ __forceinline__ void load(const GemmSm80Params& p, int64_t first_row, int64_t first_column) {
#pragma unroll
    for (int span = 0; span < K16_STEPS * 16 / SPAN; ++span) {
      const int64_t column = min(first_column + span * SPAN, p.k - 1);
      const int32_t group_idx = p.group_size.divide(static_cast<int32_t>(column));
#pragma unroll
      for (int nn = 0; nn < N_FRAGS; ++nn) {
        values[nn][span].load(p, min(first_row + nn * 8, p.n - 1), group_idx);
      }
    }
  }
  __device__ __forceinline__ const Scale& at(int frag_idx, int kk) const { return values[frag_idx][kk * 16 / SPAN]; }
};

// SPAN: columns that share a scale in the fast kernel. Scale: load(p, row, group_idx), dequantize(byte) -> a pair.
template <typename T, typename Scale, typename EpilogueColumn, int SPAN>
struct FourBitOperands {
  using X = T;
  using Out = T;
  using Acc = float;
  static constexpr int kWeightBits = 4;
  using Row = NoRow;
  using Column = EpilogueColumn;
  template <int N_FRAGS, int K16_STEPS>
  using Scales = GroupScales<Scale, N_FRAGS, K16_STEPS, SPAN>;

  template <int COLS, typename S>
  __device__ static __forceinline__ void load_weight(uint32_t (&frag)[4], const uint16_t* tile, int first_row, int nn,
                                                     int kk, const S& scales) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const CodeBytes bytes = load_codes<COLS>(tile, first_row + nn * 16 + i * 8 + threadIdx.x % 32 / 4, kk);
      const Scale& scale = scales.at(2 * nn + i, kk);
      frag[2 * i] = bits_of<T>(scale.dequantize(bytes.low));
      frag[2 * i + 1] = bits_of<T>(scale.dequantize(bytes.high));
    }
  }
  __device__ static __forceinline__ void mma(float (&acc)[4], const uint32_t (&x)[4], uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(acc, x, b0, b1);
  }
  __device__ static __forceinline__ float x_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    return DenseOperands<T>::x_value(p, row, column);
  }
  __device__ static __forceinline__ float weight_value(const GemmSm80Params& p, int64_t row, int64_t column) {
    const uint8_t byte = static_cast<const uint8_t*>(p.weight)[row * p.weight_stride + column / 2];
    Scale scale;
    scale.load(p, row, p.group_size.divide(static_cast<int32_t>(column)));
    const Pair<T> values = scale.dequantize(byte);
    return to_float(column % 2 != 0 ? values.y : values.x);
  }
};

template <typename T>
struct Int4Scale {
  T scale;
  T zero;  // what stands for 0 among uint4_pair's numbers, exact in T

  __device__ __forceinline__ void load(const GemmSm80Params& p, int64_t row, int32_t group_idx) {
    scale = static_cast<const T*>(p.weight_scale)[row * p.scale_stride + group_idx];
    const int zero_point = p.zero_point != nullptr ? p.zero_point[row * p.zero_point_stride + group_idx] : 0;
    zero = static_cast<T>(static_cast<float>(kUint4Base<T> + 8 + zero_point));
  }
  // The difference is exact, the product rounds once.
  __device__ __forceinline__ Pair<T> dequantize(uint32_t byte) const {
    return __hmul2(__hsub2(uint4_pair<T>(byte), both(zero)), both(scale));
  }
};

// group_size is a multiple of 32, or all of K is one group.
template <typename T>
using Int4Operands = FourBitOperands<T, Int4Scale<T>, BiasColumn<T>, 32>;

// E2M1 has 2 significant bits and e4m3 has 4, so their product is exact in bf16 and in fp16.
template <typename T, int GROUP>
struct Fp4Scale {
  T scale;

  __device__ __forceinline__ void load(const GemmSm80Params& p, int64_t row, int32_t group_idx) {
    const uint8_t bits = static_cast<const uint8_t*>(p.weight_scale)[row * p.scale_stride + group_idx];
    scale = GROUP == 16 ? from_e4m3<T>(bits) : from_e8m0<T>(bits);
  }
  __device__ __forceinline__ Pair<T> dequantize(uint32_t byte) const {
    return __hmul2(e2m1_pair<T>(byte), both(scale));
  }
};

template <typename T>
struct GlobalScaleColumn {
  float global_scale;
  float bias;

  __device__ __forceinline__ GlobalScaleColumn(const GemmSm80Params& p, int64_t column)
      : global_scale(p.global_scale != nullptr && column < p.n ? p.global_scale[column] : 1.0f),
        bias(BiasColumn<T>(p, column).bias) {}
  __device__ __forceinline__ float apply(float sum, NoRow) const { return sum / global_scale + bias; }
};

// Groups of 16 with e4m3 scales are NVFP4, groups of 32 with e8m0 scales are MXFP4.
template <typename T>
using Nvfp4Operands = FourBitOperands<T, Fp4Scale<T, 16>, GlobalScaleColumn<T>, 16>;
template <typename T>
using Mxfp4Operands = FourBitOperands<T, Fp4Scale<T, 32>, GlobalScaleColumn<T>, 32>;

}  // namespace fastattn
