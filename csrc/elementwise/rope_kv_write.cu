// Rotary embedding (https://arxiv.org/abs/2104.09864) of q and k with the optional RMSNorm of their heads before it
// (Qwen3, Gemma 3), and the write of k and v to the paged cache: one pass over what the QKV projection left.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)    pairs (i, i + rotary_dim / 2), or (2i, 2i + 1) if interleaved
//
//   q (T, H, D) in place   k, v (T, Hk, D) -> caches (num_blocks, block_size, Hk, D)   cos_sin (max_position,
//   rotary_dim) fp32
//
// Caches of 8 bits (e4m3, int8) take x / scale, rounded once: with a scale of each KV head that is given, or with one
// of each token's head, which is made here: its largest magnitude / 448 or 127, or 1 for zeros. In e4m3 the relative
// step of a number is 2^-3 above a power of two and 2^-4 below it, so a scale up to twice as large is taken that brings
// the head's large numbers where steps are small. Of 8 in an octave the best takes a quarter of the squared error away.
// On request heads of q and k are multiplied by a Hadamard matrix before (incoherent processing, FlashAttention-3): the
// scores stay, and the error is no longer in the few dims where q and k are both large.
//
// Grid: (token, group of heads); LANES lanes per head of q, then k, then v. A lane holds the pairs lane * VEC … of the
// rotated part and VEC elements at a time of the rest, and gives on the elements that it read: q is rotated in place.
// 8 lanes have 16 bytes each of both halves of a head of 128, which is how caches of 16 bits are written. Into 8 bits,
// or mixed, a head must lie in registers as a whole: one of 64, 128 or 256 dims, all rotated, in those of 4, 8 or 16
// lanes that have 8 neighbours of each half, and any other in a warp's, elements lane + 32 i in each lane. Memory
// bounds it with 16 bits, and with 8 the instructions of the search for scales.
#include <cmath>
#include <type_traits>

#include "arch/dispatch.h"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "arch/vec.cuh"
#include "elementwise/eight_bits.cuh"
#include "elementwise/rope_kv_write.h"

namespace fastattn {
namespace {

constexpr int kWarps = 8;

// The lanes of this one's head: a warp may have heads of q and of v.
template <int LANES>
__device__ __forceinline__ uint32_t lanes_of_head() {
  constexpr uint32_t kHead = LANES == 32 ? 0xffffffffu : (1u << LANES % 32) - 1;
  return kHead << (threadIdx.x % 32 / LANES * LANES);
}

// Over the lanes of a head, each of which gets it.
template <int LANES, typename V, typename Combine>
__device__ __forceinline__ V lanes_reduce(V value, Combine combine) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(lanes_of_head<LANES>(), value, distance));
  }
  return value;
}

template <int LANES>
__device__ __forceinline__ float lanes_sum(float value) {
  return lanes_reduce<LANES>(value, [](float a, float b) { return a + b; });
}

// Head `source` normalized (norm_weight may be nullptr) and rotated by angles cos, sin (rotary_dim / 2 each):
// put(element, values) for neighbouring elements from `element` on. DIM: of the head and its rotation, or 0 where only
// the call knows them.
template <typename T, int VEC, int LANES, bool INTERLEAVED, int DIM = 0, typename Put>
__device__ __forceinline__ void rotate_head(const T* source, const T* norm_weight, const float* cos, const float* sin,
                                            const RopeKvWriteParams& p, Put put) {
  const int lane = threadIdx.x % LANES;
  const int head_dim = DIM > 0 ? DIM : p.head_dim, rotary_dim = DIM > 0 ? DIM : p.rotary_dim;
  const int half = rotary_dim / 2;
  float scale = 1.0f;
  if (norm_weight != nullptr) {
    float square_sum = 0.0f;
#pragma unroll 1
    for (int i = lane * VEC; i < head_dim; i += LANES * VEC) {
      float values[VEC];
      load_vec<VEC>(source + i, values);
#pragma unroll
      for (float value : values) square_sum += value * value;
    }
    square_sum = lanes_sum<LANES>(square_sum);
    scale = rsqrtf(square_sum / static_cast<float>(head_dim) + p.norm_eps);
  }
  const auto load = [&](int element, auto& values) {
    constexpr int COUNT = sizeof(values) / sizeof(float);
    load_vec<COUNT>(source + element, values);
    if (norm_weight != nullptr) {
      float weight[COUNT];
      load_vec<COUNT>(norm_weight + element, weight);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) values[i] = to_float(round_to<T>(values[i] * scale * weight[i]));
    }
  };

#pragma unroll 1
  for (int pair = lane * VEC; pair < half; pair += LANES * VEC) {
    float both[2 * VEC];   // a, then b
    float c[VEC], s[VEC];  // asked for before the elements, which are waited for first
    if (cos == nullptr) {  // no such position
#pragma unroll
      for (int i = 0; i < VEC; ++i) c[i] = s[i] = NAN;
    } else {
      load_vec<VEC>(cos + pair, c);
      load_vec<VEC>(sin + pair, s);
    }
    if constexpr (INTERLEAVED) {
      float alternating[2 * VEC];
      load(2 * pair, alternating);
#pragma unroll
      for (int i = 0; i < 2 * VEC; ++i) both[i % 2 * VEC + i / 2] = alternating[i];
    } else {
      float (&a)[VEC] = reinterpret_cast<float (&)[VEC]>(both[0]);
      float (&b)[VEC] = reinterpret_cast<float (&)[VEC]>(both[VEC]);
      load(pair, a);
      load(half + pair, b);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      const float a = both[i];
      const float b = both[VEC + i];
      both[i] = a * c[i] - b * s[i];
      both[VEC + i] = b * c[i] + a * s[i];
    }
    if constexpr (INTERLEAVED) {
      float alternating[2 * VEC];
#pragma unroll
      for (int i = 0; i < 2 * VEC; ++i) alternating[i] = both[i % 2 * VEC + i / 2];
      put(2 * pair, alternating);
    } else {
      put(pair, reinterpret_cast<float (&)[VEC]>(both[0]));
      put(half + pair, reinterpret_cast<float (&)[VEC]>(both[VEC]));
    }
  }
#pragma unroll 1
  for (int element = rotary_dim + lane * VEC; element < head_dim; element += LANES * VEC) {
    float values[VEC];
    load(element, values);
    put(element, values);
  }
}

// ---- a head over a warp: a lane's elements are lane + 32 i, zeros behind the last

using Head = float[kMaxHeadDim8Bit / 32];

template <typename F>
__device__ __forceinline__ void for_each_element(int head_dim, F f) {
#pragma unroll
  for (int i = 0; i < kMaxHeadDim8Bit / 32; ++i) {
    const int element = threadIdx.x % 32 + 32 * i;
    if (element < head_dim) f(i, element);
  }
}

// Orthonormal Hadamard matrices along the head's diagonal, of the largest power of two that divides its dims: between
// lanes, and then between a lane's own elements.
__device__ __forceinline__ void hadamard(Head& x, int head_dim) {
  const int lane = threadIdx.x % 32;
  const int block = head_dim & -head_dim;
#pragma unroll
  for (int distance = 1; distance < kMaxHeadDim8Bit; distance *= 2) {
    if (distance >= block) break;
    if (distance < 32) {
#pragma unroll
      for (float& value : x) {
        const float other = __shfl_xor_sync(0xffffffffu, value, distance);
        value = lane & distance ? other - value : value + other;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMaxHeadDim8Bit / 32; ++i) {
        const int pair = i ^ distance / 32;
        if (pair < i) continue;
        const float sum = x[i] + x[pair];
        x[pair] = x[i] - x[pair];
        x[i] = sum;
      }
    }
  }
  const float norm = rsqrtf(static_cast<float>(block));
#pragma unroll
  for (float& value : x) value *= norm;
}

// rotate_head, and the Hadamard matrices if they are wanted. row: the warp's memory, through which each element comes
// to its lane whatever the rotation's order is.
template <typename T, int VEC, bool INTERLEAVED>
__device__ __forceinline__ void load_rotated(const T* source, const T* norm_weight, const float* cos, const float* sin,
                                             const RopeKvWriteParams& p, float* row, Head& x) {
  rotate_head<T, VEC, 32, INTERLEAVED>(source, norm_weight, cos, sin, p, [=](int element, const auto& values) {
    for (int i = 0; i < static_cast<int>(sizeof(values) / sizeof(float)); ++i) row[element + i] = values[i];
  });
  __syncwarp();
  for_each_element(p.head_dim, [&](int i, int element) { x[i] = row[element]; });
  if (p.hadamard) hadamard(x, p.head_dim);
}

// ---- a head over LANES lanes: elements lane * 8 … of its lower half, then those of its upper one

using Share = float[16];

// load_rotated's.
template <typename T, int LANES>
__device__ __forceinline__ void load_rotated_share(const T* source, const T* norm_weight, const float* cos,
                                                   const float* sin, const RopeKvWriteParams& p, Share& x) {
  rotate_head<T, 8, LANES, false, 16 * LANES>(source, norm_weight, cos, sin, p,
                                              [&](int element, const float (&values)[8]) {
                                                const bool upper = element >= 8 * LANES;
#pragma unroll
                                                for (int i = 0; i < 8; ++i) x[upper ? 8 + i : i] = values[i];
                                              });
}

template <int LANES>
__device__ __forceinline__ void hadamard_share(Share& x) {
  const int lane = threadIdx.x % LANES;
  const auto within = [&](int distance) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i & distance) continue;
      const float sum = x[i] + x[i + distance];
      x[i + distance] = x[i] - x[i + distance];
      x[i] = sum;
    }
  };
  within(1);
  within(2);
  within(4);
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
#pragma unroll
    for (float& value : x) {
      const float other = __shfl_xor_sync(lanes_of_head<LANES>(), value, distance);
      value = lane & distance ? other - value : value + other;
    }
  }
  within(8);
  const float norm = rsqrtf(static_cast<float>(16 * LANES));
#pragma unroll
  for (float& value : x) value *= norm;
}

// ---- numbers of 8 bits

// value as if e4m3 had no smallest exponent: 4 significant bits, rounded to nearest even (Dekker's splitting). Without
// fp8 conversions, which sm_80 has not.
__device__ __forceinline__ float round_to_4_bits(float value) {
  const float high = __fmul_rn(value, 1048577.0f);  // 2^20 + 1
  return __fsub_rn(high, __fsub_rn(high, value));
}

// 2^(i / 8)
__constant__ const float kScaleChoices[8] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                                             1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};

// Of the choices the factor of `scale` that leaves a head in e4m3 the smallest squared error; 1 if that is not a
// number. x: this lane's elements.
template <int LANES, int COUNT>
__device__ __forceinline__ float best_scale_choice(float scale, const float (&x)[COUNT]) {
  float best = 1.0f, smallest = INFINITY;
#pragma unroll
  for (float choice : kScaleChoices) {
    const float inverse = 1.0f / (scale * choice);
    float error = 0.0f;
#pragma unroll
    for (float value : x) {
      const float scaled = value * inverse;
      const float wrong = (round_to_4_bits(scaled) - scaled) * choice;
      error += wrong * wrong;
    }
    error = lanes_sum<LANES>(error);
    if (error < smallest) {
      smallest = error;
      best = choice;
    }
  }
  return best;
}

// What a head is divided by: the scale that is given, 1 if there is none; or the head's own, which is left there.
template <typename KV, int LANES, int COUNT>
__device__ __forceinline__ float head_scale(const float (&x)[COUNT], float* there, bool is_own) {
  if (!is_own) return there == nullptr ? 1.0f : *there;
  uint32_t largest = 0;
#pragma unroll
  for (float value : x) largest = max(largest, __float_as_uint(fabsf(value)));
  largest = lanes_reduce<LANES>(largest, [](uint32_t a, uint32_t b) { return max(a, b); });
  float scale = scale_of<KV>(largest);
  if constexpr (std::is_same_v<KV, __nv_fp8_e4m3>) scale *= best_scale_choice<LANES>(scale, x);
  if (threadIdx.x % LANES == 0) *there = scale;
  return scale;
}

template <typename T, typename KV, int VEC, int LANES, bool INTERLEAVED>
__global__ void __launch_bounds__(32 * kWarps, 4)
    rope_kv_write_kernel(const __grid_constant__ RopeKvWriteParams p, FastDivide groups_per_token) {
  constexpr bool IS_8BIT = sizeof(KV) == 1;
  grid_dependency_launch();
  grid_dependency_wait();
  const int64_t token_idx = groups_per_token.divide(blockIdx.x);
  const int32_t group = groups_per_token.remainder(blockIdx.x);
  int32_t head_idx = (group * blockDim.x + threadIdx.x) / LANES;
  if (head_idx >= p.num_heads + 2 * p.num_kv_heads) return;
  const bool is_query = head_idx < p.num_heads;
  if (!is_query) head_idx -= p.num_heads;
  const bool is_key = !is_query && head_idx < p.num_kv_heads;
  if (!is_query && !is_key) head_idx -= p.num_kv_heads;

  const int32_t position = p.positions[token_idx];
  const bool known = position >= 0 && position < p.max_position;
  const float* const cos = known ? p.cos_sin + position * p.cos_sin_stride : nullptr;
  const float* const sin = known ? cos + p.rotary_dim / 2 : nullptr;

  // The head, where it goes, and the scale that is beside it there.
  T* const q = static_cast<T*>(p.q) + token_idx * p.q_token_stride + head_idx * p.q_head_stride;
  const T* source = q;
  const T* weight = static_cast<const T*>(p.q_norm_weight);
  KV* target = nullptr;
  float* scale = nullptr;
  if (!is_query) {
    const int32_t slot = p.slot_mapping[token_idx];
    if (slot < 0) return;
    const int32_t block = p.block_size_div.divide(slot);
    const int32_t offset = slot - block * p.block_size;
    if (block >= p.num_blocks) return;
    const auto scale_of = [&](const KvScale& s) {
      if (s.data == nullptr) return s.data;
      return s.data + block * s.block_stride + offset * s.token_stride + head_idx * s.head_stride;
    };
    if (is_key) {
      source = static_cast<const T*>(p.k) + token_idx * p.k_token_stride + head_idx * p.k_head_stride;
      weight = static_cast<const T*>(p.k_norm_weight);
      target = static_cast<KV*>(p.k_cache) + block * p.k_block_stride + offset * p.k_slot_stride +
               head_idx * p.k_cache_head_stride;
      scale = scale_of(p.k_scale);
    } else {
      source = static_cast<const T*>(p.v) + token_idx * p.v_token_stride + head_idx * p.v_head_stride;
      target = static_cast<KV*>(p.v_cache) + block * p.v_block_stride + offset * p.v_slot_stride +
               head_idx * p.v_cache_head_stride;
      scale = scale_of(p.v_scale);
    }
  }

  const auto rotate_to = [&](T* to) {
    rotate_head<T, VEC, LANES, INTERLEAVED>(source, weight, cos, sin, p,
                                            [=](int element, const auto& values) { store_vec(to + element, values); });
  };
  if constexpr (!IS_8BIT) {
    if (is_query || is_key) {
      rotate_to(is_query ? q : target);
    } else {
#pragma unroll 1
      for (int element = threadIdx.x % LANES * VEC; element < p.head_dim; element += LANES * VEC) {
        // As it is, not through fp32: a NaN keeps its bits.
        store_pack<VEC>(target + element, load_pack<VEC>(source + element));
      }
    }
  } else {
    if (is_query && !p.hadamard) return rotate_to(q);
    if constexpr (VEC == 8) {
      const int lower = threadIdx.x % LANES * 8, upper = lower + 8 * LANES;
      Share x;
      float (&low)[8] = reinterpret_cast<float (&)[8]>(x[0]);
      float (&high)[8] = reinterpret_cast<float (&)[8]>(x[8]);
      if (is_query || is_key) {
        load_rotated_share<T, LANES>(source, weight, cos, sin, p, x);
        if (p.hadamard) hadamard_share<LANES>(x);
      } else {
        load_vec<8>(source + lower, low);
        load_vec<8>(source + upper, high);
      }
      if (is_query) {
        store_vec(q + lower, low);
        store_vec(q + upper, high);
        return;
      }
      Divider divide(head_scale<KV, LANES>(x, scale, p.scales_of_tokens));
      if (!p.scales_of_tokens) divide.in_range = false;  // an infinity is the largest number then, by a division
      store_pack<8>(target + lower, codes_of<KV>(low, divide));
      store_pack<8>(target + upper, codes_of<KV>(high, divide));
      return;
    }
    __shared__ float rows[kWarps][kMaxHeadDim8Bit];
    Head x = {};
    if (is_query || is_key) {
      load_rotated<T, VEC, INTERLEAVED>(source, weight, cos, sin, p, rows[threadIdx.x / 32], x);
    } else {
      for_each_element(p.head_dim, [&](int i, int element) { x[i] = to_float(source[element]); });
    }
    if (is_query) {
      for_each_element(p.head_dim, [&](int i, int element) { q[element] = round_to<T>(x[i]); });
    } else {
      const float divisor = head_scale<KV, 32>(x, scale, p.scales_of_tokens);
      for_each_element(p.head_dim, [&](int i, int element) { target[element] = Code<KV>::of(x[i] / divisor); });
    }
  }
}

template <typename T, typename KV, int VEC, int LANES, bool INTERLEAVED>
cudaError_t launch(const RopeKvWriteParams& p, cudaStream_t stream) {
  constexpr int64_t kMostHeads = 32 * kWarps / LANES;  // of a group
  const int64_t num_heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t groups = (num_heads + kMostHeads - 1) / kMostHeads;
  if (p.num_tokens > INT32_MAX / groups) return cudaErrorInvalidConfiguration;
  const int64_t heads = (num_heads + groups - 1) / groups;
  const int num_threads = static_cast<int>((heads * LANES + 31) / 32 * 32);
  return launch_kernel_behind(rope_kv_write_kernel<T, KV, VEC, LANES, INTERLEAVED>, p.num_tokens * groups, num_threads,
                              0, stream, p, FastDivide(static_cast<int32_t>(groups)));
}

// Whether `vec` elements, pairs of them, and their angles can be loaded at once.
bool even_rows(const RopeKvWriteParams& p, int vec) {
  const auto even = [=](auto... counts) { return ((counts % (2 * vec) == 0) && ...); };
  const auto aligned = [=](auto... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % (4 * vec) == 0) && ...);
  };
  return even(p.q_token_stride, p.q_head_stride, p.k_token_stride, p.k_head_stride, p.v_token_stride, p.v_head_stride,
              p.k_block_stride, p.k_slot_stride, p.k_cache_head_stride, p.v_block_stride, p.v_slot_stride,
              p.v_cache_head_stride, p.cos_sin_stride, p.head_dim, p.rotary_dim) &&
         aligned(p.q, p.k, p.v, p.k_cache, p.v_cache, p.cos_sin, p.q_norm_weight, p.k_norm_weight);
}

template <typename T, typename KV>
cudaError_t launch_to(const RopeKvWriteParams& p, cudaStream_t stream) {
  if (!p.interleaved && even_rows(p, 8)) {
    if constexpr (sizeof(KV) == sizeof(T)) {
      return launch<T, T, 8, 8, false>(p, stream);
    } else if (p.rotary_dim == p.head_dim) {
      if (p.head_dim == 64) return launch<T, KV, 8, 4, false>(p, stream);
      if (p.head_dim == 128) return launch<T, KV, 8, 8, false>(p, stream);
      if (p.head_dim == 256) return launch<T, KV, 8, 16, false>(p, stream);
    }
  }
  if (even_rows(p, 2)) {
    return p.interleaved ? launch<T, KV, 2, 32, true>(p, stream) : launch<T, KV, 2, 32, false>(p, stream);
  }
  return p.interleaved ? launch<T, KV, 1, 32, true>(p, stream) : launch<T, KV, 1, 32, false>(p, stream);
}

}  // namespace

cudaError_t rope_kv_write(const RopeKvWriteParams& params, cudaStream_t stream) {
  RopeKvWriteParams p = params;
  p.block_size_div = FastDivide(p.block_size);
  return dispatch_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.cache_dtype == DType::kFloat8E4M3) return launch_to<T, __nv_fp8_e4m3>(p, stream);
    return p.cache_dtype == DType::kInt8 ? launch_to<T, int8_t>(p, stream) : launch_to<T, T>(p, stream);
  });
}

}  // namespace fastattn
