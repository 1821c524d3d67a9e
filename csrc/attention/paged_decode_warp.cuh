// What a warp of the decode kernels does (paged_decode.cuh, paged_decode_cluster.cuh): its stages of keys and values in
// shared memory, their loads, their products, and how the results of several are added up.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "arch/cp_async.cuh"
#include "arch/e4m3.cuh"
#include "arch/pair.cuh"
#include "arch/warp_gemm_8bit.cuh"
#include "arch/warp_gemm_sm80.cuh"
#include "attention/paged_decode_plan.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

// ---------------------------------------------------------------------------------------------
// Shared memory

// Of one warp. Once consumed, a stage can take its O: 16 rows of fp32 are as large as its keys and values.
template <typename KV, int HEAD_DIM>
struct PagedDecodeRing {
  static constexpr int kStages = paged_decode_stages(HEAD_DIM, sizeof(KV) == 1);
  static constexpr int kMaxThreads = 32 * paged_decode_max_warps(HEAD_DIM);
  static constexpr bool k8Bit = sizeof(KV) == 1;
  static constexpr int kKeys = paged_decode_warp_keys(HEAD_DIM, k8Bit);
  static constexpr int kColumns = HEAD_DIM * sizeof(KV) / 2;  // of a row, as 16-bit values

  struct Rows {
    uint16_t k[kKeys * kColumns];
    uint16_t v[kKeys * kColumns];
  };
  struct RowsWithScales : Rows {
    float k_scale[kKeys];  // of tokens only
    float v_scale[kKeys];
  };
  using Stage = std::conditional_t<k8Bit, RowsWithScales, Rows>;
  static_assert(sizeof(Rows) >= kPagedDecodeRows * HEAD_DIM * sizeof(float));

  alignas(128) Stage stages[kStages];
};

// The same, with the rows of Q of the sequence that begins next, which come with its first tile. With three stages two
// sequences may begin before the first of them is in hand; there Q comes straight into registers, and so it does where
// registers are short.
template <typename KV, int HEAD_DIM>
struct PagedDecodeRingWithQ : PagedDecodeRing<KV, HEAD_DIM> {
  static constexpr bool kLooksAhead = HEAD_DIM <= 128;  // registers for that are there
  static constexpr bool kHasQ = kLooksAhead && PagedDecodeRing<KV, HEAD_DIM>::kStages == 2;
  static constexpr int kRow = HEAD_DIM + 8;  // rows begin in different banks

  alignas(16) uint16_t q[kHasQ ? kPagedDecodeRows * kRow : 8];
};

// What a warp has found for each row, beside O.
struct DecodeRowSums {
  float row_max[kPagedDecodeRows];
  float row_sum[kPagedDecodeRows];
};

// Where four neighbouring dims of a row lie in a stage that holds O: rows begin in different banks.
template <int HEAD_DIM>
__device__ __forceinline__ int out_offset(int row, int group) {
  return row * HEAD_DIM + (group ^ (row & 7)) * 4;
}

// ---------------------------------------------------------------------------------------------
// Loads

// Asks for a tile of a warp's. Lane l says where the l-th of its rows lies: key l of 16 for l < 16, value l - 16 for
// the others; or, where a tile has 32, key l, and then value l. `block` is its page, or of contiguous keys the
// sequence.
template <typename KV, int HEAD_DIM>
struct DecodeRows {
  using Ring = PagedDecodeRing<KV, HEAD_DIM>;
  using Stage = typename Ring::Stage;
  static constexpr int KEYS = Ring::kKeys;
  static constexpr int CHUNK = 16 / sizeof(KV);                                           // elements of 16 bytes
  static constexpr int CHUNKS = HEAD_DIM / CHUNK;                                         // of a row
  static constexpr int LANES = (CHUNKS & (CHUNKS - 1)) == 0 ? CHUNKS : CHUNKS & -CHUNKS;  // along a row
  static constexpr int ROWS_PER_PASS = 32 / LANES;

  const PagedDecodeParams& p;
  int32_t kv_head_idx;
  bool evict_first;

  __device__ __forceinline__ void load(Stage& stage, bool exists, int32_t block, int32_t token) const {
    const uint32_t rows_exist = __ballot_sync(0xffffffffu, exists);
    // Not with 16 bits, whose rows came in bursts so: 128 x 4,096 took 7 % longer.
    if (Ring::k8Bit && p.even_rows) {
#pragma unroll
      for (int first = 0; first < KEYS; first += kPagedDecodeEvenRows) {
        // Of the first of them that exists; if none does, nothing is read.
        const int from = first + max(__ffs(rows_exist >> first & ((1 << kPagedDecodeEvenRows) - 1)) - 1, 0);
        const int32_t run_block = __shfl_sync(0xffffffffu, block, from);
        const int32_t run_token = __shfl_sync(0xffffffffu, token, from) - from % kPagedDecodeEvenRows + lane_row();
        const auto load_run = [&](bool is_value, uint16_t* tile) {
          const char* const own_row =
              reinterpret_cast<const char*>(row_of(is_value, true, run_block, run_token) + lane_chunk() * CHUNK);
          const auto distance = static_cast<uint32_t>((is_value ? p.v_token_stride : p.k_token_stride) * sizeof(KV));
          load_rows<kPagedDecodeEvenRows>(tile + first * Ring::kColumns, rows_exist >> first, is_value, [&](int row) {
            return reinterpret_cast<const KV*>(own_row + static_cast<uint64_t>(distance) * row);
          });
        };
        load_run(false, stage.k);
        load_run(true, stage.v);
      }
    } else {
      const KV* const own_row = row_of(threadIdx.x % 32 >= KEYS, exists, block, token);
      load_operand(stage.k, own_row, 0, rows_exist, p.head_dim);
      load_operand(stage.v, KEYS < 32 ? own_row : row_of(true, exists, block, token), KEYS % 32, rows_exist,
                   p.v_head_dim);
    }
    if constexpr (Ring::k8Bit) {
      if (p.scales_of_tokens) {
        const auto load_scale = [&](float* target, const KvScale& scale) {
          const float* source = scale.data + kv_head_idx * scale.head_stride;
          if (exists) source += block * scale.block_stride + token * scale.token_stride;
          cp_async_4(target + threadIdx.x % 32, source, exists);
        };
        load_scale(stage.k_scale, p.k_scale);
        load_scale(stage.v_scale, p.v_scale);
      }
    }
  }

  // Asks for the rows, of a page that exists, in the L2 cache; whether they are to be loaded need not be known yet.
  __device__ __forceinline__ void prefetch(int32_t block, int32_t token) const {
    static_assert(KEYS == 16);
    const bool is_value = threadIdx.x % 32 >= KEYS;
    const KV* const row = row_of(is_value, true, block, token);
#pragma unroll
    for (int i = 0; i < HEAD_DIM; i += 128 / sizeof(KV)) {
      if (i < (is_value ? p.v_head_dim : p.head_dim)) prefetch_l2(row + i);
    }
  }

 private:
  // Of a pass's rows and of a row's first chunks, those that the lane copies.
  static __device__ __forceinline__ int lane_row() { return threadIdx.x % 32 / LANES; }
  static __device__ __forceinline__ int lane_chunk() { return threadIdx.x % LANES; }

  __device__ __forceinline__ const KV* row_of(bool is_value, bool exists, int32_t block, int32_t token) const {
    const KV* const row =
        static_cast<const KV*>(is_value ? p.v : p.k) + kv_head_idx * (is_value ? p.v_head_stride : p.k_head_stride);
    if (!exists) return row;
    return row + block * (is_value ? p.v_block_stride : p.k_block_stride) +
           token * (is_value ? p.v_token_stride : p.k_token_stride);
  }

  __device__ __forceinline__ void load_operand(uint16_t* tile, const KV* own_row, int first_lane, uint32_t rows_exist,
                                               int32_t head_dim) const {
    const int lane = threadIdx.x % 32;
    const int lane_row = lane / LANES;
    const uint64_t policy = evict_first ? evict_first_policy() : evict_normal_policy();
#pragma unroll
    for (int i = 0; i < KEYS; i += ROWS_PER_PASS) {
      const KV* const source = reinterpret_cast<const KV*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(own_row), first_lane + i + lane_row));
#pragma unroll
      for (int chunk = lane % LANES; chunk < CHUNKS; chunk += LANES) {
        const bool in_row = chunk * CHUNK < head_dim;
        cp_async_16(tile + swizzled<Ring::kColumns>(i + lane_row, chunk), source + (in_row ? chunk * CHUNK : 0),
                    in_row && (rows_exist >> (first_lane + i + lane_row) & 1) != 0, policy);
      }
    }
  }

  // The first NUM_ROWS rows of a tile, of which those exist that have a bit; source_of(i) is where the
  // lane's first chunk of row i + lane_row() lies. No bit of a pass's first row, or of a lane's further chunks, is one
  // of the lane's own, so that its addresses follow from one by constants.
  template <int NUM_ROWS, typename SourceOf>
  __device__ __forceinline__ void load_rows(uint16_t* tile, uint32_t rows_exist, bool is_value,
                                            SourceOf source_of) const {
    constexpr int COLUMNS = Ring::kColumns;
    const int32_t head_dim = is_value ? p.v_head_dim : p.head_dim;
    const LaneAddress<COLUMNS> target(tile, lane_row(), lane_chunk());
    const uint64_t policy = evict_first ? evict_first_policy() : evict_normal_policy();
    uint32_t exist[CHUNKS / LANES];  // bit i: row i + lane_row(), and the chunk in it
#pragma unroll
    for (int i = 0; i < CHUNKS / LANES; ++i) {
      exist[i] = (lane_chunk() + i * LANES) * CHUNK < head_dim ? rows_exist >> lane_row() : 0;
    }
#pragma unroll
    for (int row = 0; row < NUM_ROWS; row += ROWS_PER_PASS) {
      const KV* const source = source_of(row);
      const int swizzle = swizzled<COLUMNS>(row, 0) / 8 - row * COLUMNS / 8;
#pragma unroll
      for (int i = 0; i < CHUNKS / LANES; ++i) {
        cp_async_16_if(target.at(row, i * LANES ^ swizzle), source + i * LANES * CHUNK, exist[i] & 1u << row, policy);
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------
// K and V of 8 bits

// Q and out are bf16 or fp16, which these kernels see at run time only (T is uint16_t): products are fp16's in any
// case.

// Half of the fragments that warp_scores_8bit wants: a lane's share of a row of q, in fp16 and times a power of two,
// and what its products are to be multiplied by to undo that. Dims from head_dim on are zeros. By whole warps.
template <int HEAD_DIM>
__device__ __forceinline__ void load_q_8bit(uint32_t (&q_frag)[HEAD_DIM / 16][4], float& row_scale, const uint16_t* row,
                                            bool fp16, int half, int32_t head_dim) {
  constexpr int CHUNKS = HEAD_DIM / 16;
  uint2 fours[CHUNKS];
  uint32_t magnitudes = 0;  // the largest of even and of odd dims
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    fours[chunk] = make_uint2(0, 0);
    if (chunk * 16 < head_dim) {
      fours[chunk] = *reinterpret_cast<const uint2*>(row + chunk * 16 + threadIdx.x % 4 * 4);
    }
    magnitudes = max_magnitudes(max_magnitudes(magnitudes, fours[chunk].x), fours[chunk].y);
  }
  uint32_t largest = max(magnitudes >> 16, magnitudes & 0xffffu);
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  // From the bits of its exponent; above 2^126 the inverse would be 0.
  const uint32_t exponent = min(__float_as_uint(unpack_pair_as(fp16, largest).x) >> 23, 253u);
  row_scale = __uint_as_float(exponent << 23);
  const float inverse = __uint_as_float((254u - exponent) << 23);
  const auto scale = [&](auto unpack) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const float2 low = unpack(fours[chunk].x), high = unpack(fours[chunk].y);
      q_frag[chunk][half] = pack_pair<__half>(low.x * inverse, low.y * inverse);
      q_frag[chunk][2 + half] = pack_pair<__half>(high.x * inverse, high.y * inverse);
    }
  };
  fp16 ? scale([](uint32_t pair) { return unpack_pair<__half>(pair); })
       : scale([](uint32_t pair) { return unpack_pair<__nv_bfloat16>(pair); });
}

__device__ __forceinline__ float scale_of_head(const KvScale& scale, int32_t kv_head_idx) {
  return scale.data == nullptr ? 1.0f : scale.data[kv_head_idx * scale.head_stride];
}

// Those of a lane's columns of the scores, or ones.
template <int KEY_TILES>
__device__ __forceinline__ void scales_of_lane(float (&scales)[KEY_TILES][2], const float* of_keys, bool there) {
#pragma unroll
  for (int tile = 0; tile < KEY_TILES; ++tile) {
    const float2 pair =
        there ? *reinterpret_cast<const float2*>(of_keys + tile * 8 + threadIdx.x % 4 * 2) : make_float2(1.0f, 1.0f);
    scales[tile][0] = pair.x;
    scales[tile][1] = pair.y;
  }
}

// ---------------------------------------------------------------------------------------------
// Products

// Q's fragments, and what a warp has of the sequence in hand. The rows are those of a column.
template <typename T, typename KV, int HEAD_DIM>
struct DecodeProducts {
  using Ring = PagedDecodeRing<KV, HEAD_DIM>;
  static constexpr bool K_8BIT = Ring::k8Bit;
  static constexpr int KEYS = Ring::kKeys, KEY_TILES = KEYS / 8;

  uint32_t q_frag[HEAD_DIM / 16][4];
  OnlineSoftmax<1> softmax;
  float acc[1][HEAD_DIM / 8][4];
  // K and V of 8 bits: what scores are to be multiplied by, and O.
  float row_scale[2], value_scale = 1.0f;

  __device__ __forceinline__ void begin(const PagedDecodeParams& p) {
    constexpr float kLeastScale = 1e-30f;
    if (K_8BIT && p.scales_of_tokens) value_scale = kLeastScale;
    softmax = OnlineSoftmax<1>();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) acc[0][i / 4][i % 4] = 0.0f;
  }

  // Half of a lane's rows: row lane / 4 of the first eight, or of the others. One that does not exist is zeros.
  __device__ __forceinline__ void load_q(const PagedDecodeParams& p, int half, const T* row, bool exists,
                                         int32_t kv_head_idx) {
    if constexpr (K_8BIT) {
      load_q_8bit<HEAD_DIM>(q_frag, row_scale[half], row, p.dtype == DType::kFloat16, half, exists ? p.head_dim : 0);
      if (!p.scales_of_tokens) row_scale[half] *= scale_of_head(p.k_scale, kv_head_idx);
    } else {
#pragma unroll
      for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
        const bool valid = exists && chunk * 8 < p.head_dim;
        const T* const pair = row + chunk * 8 + 2 * (threadIdx.x % 4);
        q_frag[chunk / 2][chunk % 2 * 2 + half] = valid ? *reinterpret_cast<const uint32_t*>(pair) : 0;
      }
    }
  }
  // The same where none of the half's rows exists.
  __device__ __forceinline__ void clear_q(int half) {
#pragma unroll
    for (int chunk = 0; chunk < HEAD_DIM / 16; ++chunk) q_frag[chunk][half] = q_frag[chunk][2 + half] = 0;
    row_scale[half] = 0.0f;
  }
  // Once for both.
  __device__ __forceinline__ void load_value_scale(const PagedDecodeParams& p, int32_t kv_head_idx) {
    if constexpr (K_8BIT) {
      if (!p.scales_of_tokens) value_scale = scale_of_head(p.v_scale, kv_head_idx);
    }
  }

  // Adds a tile, whose first key is first_key.
  template <typename Mask>
  __device__ __forceinline__ void add(const PagedDecodeParams& p, const ScoreScale& score_scale,
                                      const DecodeColumn& column, const DecodeSequence<Mask>& sequence, int32_t seq_idx,
                                      int32_t first_key, typename Ring::Stage& now) {
    const int lane = threadIdx.x % 32;
    // Softcap and ALiBi give scores in base 2; without them the softmax scales.
    const bool general = is_general(p, score_scale);
    // The KV head's row of a lane's scores [..][2 * half ..]; behind the end it is the last one again.
    const auto lane_row = [&](int half) {
      return column.first_row + max(min(half * 8 + lane / 4, sequence.num_rows - 1), 0);
    };
    float scores[1][KEY_TILES][4] = {};
    if constexpr (K_8BIT) {
      warp_scores_8bit<KV>(scores[0], q_frag, KeyRows<HEAD_DIM>(now.k));
      float k_scale[KEY_TILES][2];
      scales_of_lane(k_scale, now.k_scale, p.scales_of_tokens);
#pragma unroll
      for (int i = 0; i < 4 * KEY_TILES; ++i) scores[0][i / 4][i % 4] *= row_scale[i % 4 / 2] * k_scale[i / 4][i % 2];
    } else {
      float odd_scores[KEY_TILES][4] = {};  // a second chain of products
      const WarpOperandB<HEAD_DIM> keys(now.k, 0);
#pragma unroll
      for (int kk = 0; kk < HEAD_DIM / 16; ++kk) {
        auto& sums = kk % 2 == 0 ? scores[0] : odd_scores;
#pragma unroll
        for (int tile = 0; tile < KEY_TILES; tile += 2) {
          uint32_t k_frag[4];
          keys.load(k_frag, tile * 8, kk);
          mma_m16n8k16<T>(sums[tile], q_frag[kk], k_frag[0], k_frag[1]);
          mma_m16n8k16<T>(sums[tile + 1], q_frag[kk], k_frag[2], k_frag[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * KEY_TILES; ++i) scores[0][i / 4][i % 4] += odd_scores[i / 4][i % 4];
    }

    const Mask& mask = sequence.mask;
    const int32_t lane_key = first_key + 2 * (lane % 4);
    if (general) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = lane_row(half);
        const typename Mask::Row mask_row = mask.row(p.group_size.divide(row));
        float slope = 0.0f;
        if (p.alibi_slopes != nullptr) {
          slope = kLog2E * p.alibi_slopes[seq_idx * p.alibi_batch_stride + column.head(p, row)];
        }
#pragma unroll
        for (int j = 0; j < 2 * KEY_TILES; ++j) {
          float& score = scores[0][j / 2][half * 2 + j % 2];
          score *= score_scale.pre;
          if (score_scale.softcap > 0.0f) score = score_scale.softcap * tanh_exp2(score);
          score -= slope * mask_row.distance(lane_key + j / 2 * 8 + j % 2);
        }
      }
    }
    // Not where all rows see all of the warp's keys.
    const KeyRange seen_by_all = mask.seen_by_all(sequence.first_token, sequence.last_token);
    if (first_key < seen_by_all.begin || first_key + KEYS > seen_by_all.end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const typename Mask::Row mask_row = mask.row(p.group_size.divide(lane_row(half)));
#pragma unroll
        for (int j = 0; j < 2 * KEY_TILES; ++j) {
          if (!mask_row.sees(lane_key + j / 2 * 8 + j % 2)) scores[0][j / 2][half * 2 + j % 2] = -INFINITY;
        }
      }
    }
    softmax.update(scores, acc, softmax_scale(p, score_scale));
    if constexpr (K_8BIT) {
      if (p.scales_of_tokens) {
        // Numbers that are not negative are ordered as their bits are, of which one instruction finds the largest.
        const float largest =
            __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(now.v_scale[lane]))));
        if (largest > value_scale) {
          const float correction = __fdividef(value_scale, largest);
          value_scale = largest;
#pragma unroll
          for (int i = 0; i < HEAD_DIM / 2; ++i) acc[0][i / 4][i % 4] *= correction;
        }
        float v_scale[KEY_TILES][2];
        scales_of_lane(v_scale, now.v_scale, true);
        const float inverse = __fdividef(1.0f, value_scale);
#pragma unroll
        for (int i = 0; i < 4 * KEY_TILES; ++i) scores[0][i / 4][i % 4] *= v_scale[i / 4][i % 2] * inverse;
      }
      warp_gemm_8bit<KV>(acc[0], scores[0], KeyRows<HEAD_DIM>(now.v));
    } else {
      warp_gemm_registers<T, 3>(acc, scores, WarpOperandB<HEAD_DIM, true>(now.v, 0));
    }
  }

  static __device__ __forceinline__ bool is_general(const PagedDecodeParams& p, const ScoreScale& score_scale) {
    return score_scale.softcap > 0.0f || p.alibi_slopes != nullptr;
  }
  static __device__ __forceinline__ float softmax_scale(const PagedDecodeParams& p, const ScoreScale& score_scale) {
    return is_general(p, score_scale) ? 1.0f : score_scale.pre;
  }

  // The results in 16 bits of up to eight rows, of a warp that has had all of a sequence's keys, out of its registers.
  template <typename Output>
  __device__ __forceinline__ void store(const PagedDecodeParams& p, const ScoreScale& score_scale, int32_t all_rows,
                                        const Output& output) {
    static_assert(K_8BIT);
    const int lane = threadIdx.x % 32, row = lane / 4;
    softmax.finish(softmax_scale(p, score_scale));
    if (row >= all_rows) return;
    const bool exists = row < output.num_rows;
    const typename Output::Row target =
        output.row(row, exists ? softmax.row_max[0][0] : -INFINITY, exists ? softmax.row_sum[0][0] : 0.0f);
    const float scale = exists ? value_scale * target.final.inverse : 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < HEAD_DIM / 16; ++chunk) {
      const float (&even)[4] = acc[0][2 * chunk], (&odd)[4] = acc[0][2 * chunk + 1];
      if (chunk * 16 < p.v_head_dim) {
        output.store_16bit(target, chunk * 4 + lane % 4, even[0] * scale, odd[0] * scale, even[1] * scale,
                           odd[1] * scale);
      }
    }
    if (lane % 4 == 0) output.store_lse(target);
  }

  // Leaves the results of rows that exist in the stage consumed last.
  __device__ __forceinline__ void finish(const PagedDecodeParams& p, const ScoreScale& score_scale, int32_t num_rows,
                                         typename Ring::Stage& now, DecodeRowSums& row_sums) {
    const int lane = threadIdx.x % 32;
    softmax.finish(softmax_scale(p, score_scale));
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * 8 >= num_rows) continue;
      const int row = half * 8 + lane / 4;
      if (lane % 4 == 0) {
        row_sums.row_max[row] = softmax.row_max[0][half];
        row_sums.row_sum[row] = softmax.row_sum[0][half];
      }
      float* const target = reinterpret_cast<float*>(&now);
#pragma unroll
      for (int nn = 0; nn < HEAD_DIM / 8; ++nn) {
        const float (&sums)[4] = acc[0][nn];
        if constexpr (!K_8BIT) {
          *reinterpret_cast<float2*>(target + out_offset<HEAD_DIM>(row, nn * 2 + lane % 4 / 2) + lane % 2 * 2) =
              make_float2(sums[2 * half], sums[2 * half + 1]);
        } else if (nn % 2 == 0) {
          const float (&odd_sums)[4] = acc[0][nn + 1];
          *reinterpret_cast<float4*>(target + out_offset<HEAD_DIM>(row, nn * 2 + lane % 4)) =
              make_float4(sums[2 * half] * value_scale, odd_sums[2 * half] * value_scale,
                          sums[2 * half + 1] * value_scale, odd_sums[2 * half + 1] * value_scale);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Results

// Four dims of a row relative to a reference of exponentials, and their sum.
struct DecodePartial {
  float row_max = -INFINITY;
  float row_sum = 0.0f;
  float sums[4] = {};

  // All of N more at once; the order of additions is theirs. One that has seen nothing changes no bit. What is rounded
  // when is explicit: this is compiled in several places, and which of them adds up a sequence depends on the batch.
  template <int N>
  __device__ __forceinline__ void add(const float2 (&others)[N], const float4 (&other_sums)[N]) {
    float new_max = row_max;
#pragma unroll
    for (int i = 0; i < N; ++i) new_max = fmaxf(new_max, others[i].x);
    const float correction = exp2_approx(row_max - finite_max(new_max));
    row_max = new_max;
    row_sum = __fmul_rn(row_sum, correction);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = __fmul_rn(sums[i], correction);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float weight = exp2_approx(others[i].x - finite_max(new_max));
      row_sum = __fmaf_rn(weight, others[i].y, row_sum);
      sums[0] = __fmaf_rn(weight, other_sums[i].x, sums[0]);
      sums[1] = __fmaf_rn(weight, other_sums[i].y, sums[1]);
      sums[2] = __fmaf_rn(weight, other_sums[i].z, sums[2]);
      sums[3] = __fmaf_rn(weight, other_sums[i].w, sums[3]);
    }
  }
};

// Where a column's rows of a sequence go.
template <typename T, typename Mask>
struct DecodeOutput {
  const PagedDecodeParams& p;
  const DecodeColumn& column;
  int64_t out_token;  // the sequence's first one in out
  int64_t lse_begin;  // where the sequence begins in lse
  int32_t num_rows;

  __device__ __forceinline__ DecodeOutput(const PagedDecodeParams& params, const DecodeColumn& of_cta,
                                          const DecodeSequence<Mask>& sequence, int32_t seq_idx)
      : p(params), column(of_cta), num_rows(sequence.num_rows) {
    const bool packed_q = p.cu_seqlens_q != nullptr;
    out_token = packed_q ? sequence.q_start : static_cast<int64_t>(seq_idx) * p.batch_q_len;
    lse_begin = packed_q ? sequence.q_start : out_token * p.num_heads;
  }

  struct Row {
    RowResult final;
    int64_t element;  // its first one in out
    int32_t token, head;
  };

  __device__ __forceinline__ Row row(int32_t row, float row_max, float row_sum) const {
    const int32_t token = p.group_size.divide(column.first_row + row);
    const int32_t head = column.head(p, column.first_row + row);
    const float sink = p.sinks == nullptr || row >= num_rows ? -INFINITY : p.sinks[head] * kLog2E;
    return {finish_row(row_max, row_sum, sink), ((out_token + token) * p.num_heads + head) * p.v_head_dim, token, head};
  }

  __device__ __forceinline__ void store(int32_t row_idx, int group, const DecodePartial& result) const {
    const Row of_result = row(row_idx, result.row_max, result.row_sum);
    store_group(of_result, group, result.sums);
    if (group == 0) store_lse(of_result);
  }

  __device__ __forceinline__ void store_group(const Row& row, int group, const float (&sums)[4]) const {
    if (__builtin_expect(p.out_scale != nullptr, 0)) {
      const float inverse = __fdividef(row.final.inverse, *p.out_scale);
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.out) + row.element + group * 4) =
          pack_e4m3(sums[0] * inverse, sums[1] * inverse, sums[2] * inverse, sums[3] * inverse);
    } else {
      const float inverse = row.final.inverse;
      store_16bit(row, group, sums[0] * inverse, sums[1] * inverse, sums[2] * inverse, sums[3] * inverse);
    }
  }

  __device__ __forceinline__ void store_16bit(const Row& row, int group, float a, float b, float c, float d) const {
    const auto pack = [&](float low, float high) {
      if constexpr (std::is_same_v<T, uint16_t>) {
        return pack_pair_as(p.dtype == DType::kFloat16, low, high);
      } else {
        return pack_pair<T>(low, high);
      }
    };
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + row.element + group * 4) = make_uint2(pack(a, b), pack(c, d));
  }

  __device__ __forceinline__ void store_lse(const Row& row) const {
    p.lse[lse_begin + row.head * (p.cu_seqlens_q != nullptr ? p.num_tokens : p.batch_q_len) + row.token] =
        row.final.lse;
  }
};

}  // namespace fastattn
