// The attention of the kernel for a decoder's layers (decode_layers_sm90.cuh): a CTA's part of a head's keys, and what
// is made of all parts. Included behind the kernel's struct.
#pragma once

namespace fastattn {
namespace {

// Scores and sums of this CTA's part: for each head of the group the largest score, the sum of probabilities and that
// of values, of all its warps, to whoever merges. The only part of its keys is what the next product multiplies.
template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::attend(int layer) {
  constexpr int CHUNKS = HEAD_DIM / 32;  // 16 bytes a lane of a row of K
  constexpr int HALVES = HEAD_DIM / 64;  // 16 bytes a lane of a row of V
  constexpr int STEPS = early_steps(HEAD_DIM);
  forget();
  const Part& mine = part();
  if (mine.begin >= mine.end) return;
  const bool has_new = mine.end == mine.length;
  const int my_begin = mine.begin + warp * mine.warp_keys, my_end = min(mine.end, my_begin + mine.warp_keys);
  const bool is_long = mine.warp_keys > kKnownKeys;
  // Of 16 keys a lane has, of K, those of rows g and g + 8, dims 32 c + 8 t and on; of V keys 2t, 2t + 1 and the two 8
  // further on, dims 64 h + 8 g and on: two of them for each j are rows of the second product's A, and nothing is
  // transposed.
  const int row_pitch = s.kv_heads * HEAD_DIM;
  const T* const keys_of_layer = static_cast<const T*>(p.layers[layer].k_cache) + mine.kv_head * HEAD_DIM + 8 * t;
  const T* const values_of_layer = static_cast<const T*>(p.layers[layer].v_cache) + mine.kv_head * HEAD_DIM + 8 * g;
  uint4 k[STEPS][2][CHUNKS], v[STEPS][4][HALVES];
  const auto load_keys = [&](int step, const int* known) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = known[8 * j + g];
      const T* row = keys_of_layer + int64_t{at} * row_pitch;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        k[step][j][c] = at >= 0 ? load_early(reinterpret_cast<const uint4*>(row + 32 * c)) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  const auto load_values = [&](int step, const int* known) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = known[2 * t + j % 2 + j / 2 * 8];
      const T* row = values_of_layer + int64_t{at} * row_pitch;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        v[step][j][h] = at >= 0 ? load_early(reinterpret_cast<const uint4*>(row + 64 * h)) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  // Steps from key `first` of this warp's on.
  const auto load = [&](int first, bool with_keys, bool with_values) {
    const int* const known = rows() + first % kKnownKeys;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (with_keys) load_keys(step, known + step * kStepKeys);
      if (with_values) load_values(step, known + step * kStepKeys);
    }
  };
  const auto know = [&](int first) {
    if (!is_long || first % kKnownKeys != 0) return;
    __syncwarp();
    bring_rows(mine, first);
    __syncwarp();
  };
  know(0);
  load(0, true, HEAD_DIM == 64);  // while q is on its way; for more there are no registers yet

  T* const heads = reinterpret_cast<T*>(smem + layout.heads);  // of q, and then the new key and value
#pragma unroll 1
  for (int i = warp; i < s.group + (has_new ? 2 : 0); i += kWarps) {
    const int head = i < s.group ? mine.kv_head * s.group + i : s.heads + (i - s.group) * s.kv_heads + mine.kv_head;
    const void* norm = nullptr;
    if (s.has_head_norms && i <= s.group) norm = i < s.group ? p.layers[layer].q_norm : p.layers[layer].k_norm;
    bring_head(mine.token, head * HEAD_DIM, i <= s.group, norm, heads + i * HEAD_DIM);
  }
  sync();
  const T* const new_key = heads + s.group * HEAD_DIM;
  if (has_new && mine.slot >= 0 && thread < HEAD_DIM / 4) {
    const int of = thread / (HEAD_DIM / 8), at = thread % (HEAD_DIM / 8) * 8;
    T* row = static_cast<T*>(of == 0 ? p.layers[layer].k_cache : p.layers[layer].v_cache) +
             (int64_t{mine.slot} * s.kv_heads + mine.kv_head) * HEAD_DIM;
    store_pack<8>(row + at, load_pack<8>(new_key + of * HEAD_DIM + at));
  }

  const float scale = p.softmax_scale * 1.4426950408889634f;
  float largest = -INFINITY, sum = 0.0f;  // of head g; the sum of this lane's keys
  float out[HALVES][4][4] = {};           // of dims 64 h + 8 g + 2j and the next, each of heads 2t, 2t + 1

#pragma unroll 1
  for (int first = my_begin; first < my_end; first += STEPS * kStepKeys) {
    if (first > my_begin) {
      know(first - my_begin);
      load(first - my_begin, true, HEAD_DIM == 64);
    }
    if (HEAD_DIM != 64) load(first - my_begin, false, true);
    if (has_new && first + STEPS * kStepKeys >= mine.length) {  // its place among them
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int left = mine.length - 1 - first - step * kStepKeys;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (8 * j + g != left) continue;
#pragma unroll
          for (int c = 0; c < CHUNKS; ++c) k[step][j][c] = *reinterpret_cast<const uint4*>(new_key + 32 * c + 8 * t);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (2 * t + j % 2 + j / 2 * 8 != left) continue;
#pragma unroll
          for (int h = 0; h < HALVES; ++h) {
            v[step][j][h] = *reinterpret_cast<const uint4*>(new_key + HEAD_DIM + 64 * h + 8 * g);
          }
        }
      }
    }
    float scores[STEPS][2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      uint4 q = make_uint4(0, 0, 0, 0);
      if (g < s.group) q = *reinterpret_cast<const uint4*>(heads + g * HEAD_DIM + 32 * c + 8 * t);
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) {
        mma_m16n8k16<T>(scores[i / 2][i % 2], {q.x, 0, q.y, 0}, k[i / 2][i % 2][c].x, k[i / 2][i % 2][c].y);
      }
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) {
        mma_m16n8k16<T>(scores[i / 2][i % 2], {q.z, 0, q.w, 0}, k[i / 2][i % 2][c].z, k[i / 2][i % 2][c].w);
      }
    }
    float now = largest;
#pragma unroll
    for (int i = 0; i < 4 * STEPS; ++i) {
      float& score = scores[i / 4][i / 2 % 2][i % 2];
      score = first + i / 2 * 8 + 2 * t + i % 2 < my_end ? score * scale : -INFINITY;
      now = fmaxf(now, score);
    }
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
    const float shrink = exp2_approx(largest - now);
    largest = now;
    uint32_t probabilities[STEPS][2];
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) {
      const float* const pair = scores[i / 2][i % 2];
      const float one = exp2_approx(pair[0] - now), other = exp2_approx(pair[1] - now);
      sum += one + other;
      probabilities[i / 2][i % 2] = pack_pair<T>(one, other);
    }
    const float shrinks[2] = {__shfl_sync(0xffffffffu, shrink, 8 * t), __shfl_sync(0xffffffffu, shrink, 8 * t + 4)};
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto word = [&](const uint4& of) { return j == 0 ? of.x : j == 1 ? of.y : j == 2 ? of.z : of.w; };
#pragma unroll
        for (int i = 0; i < 4; ++i) out[h][j][i] *= shrinks[i % 2];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
          const uint32_t rows[4] = {word(v[step][0][h]), word(v[step][1][h]), word(v[step][2][h]), word(v[step][3][h])};
          mma_m16n8k16<T>(out[h][j],
                          {__byte_perm(rows[0], rows[1], 0x5410), __byte_perm(rows[0], rows[1], 0x7632),
                           __byte_perm(rows[2], rows[3], 0x5410), __byte_perm(rows[2], rows[3], 0x7632)},
                          probabilities[step][0], probabilities[step][1]);
        }
      }
    }
  }

  // Of all warps.
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  constexpr int PITCH = HEAD_DIM + 4;
  float* const partials = reinterpret_cast<float*>(smem + layout.partial);
  float* const of_warp_heads = partials + warp * kDecodeMaxGroup * PITCH;
  if (2 * t < kDecodeMaxGroup) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int of = 0; of < 2; ++of) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          *reinterpret_cast<float4*>(of_warp_heads + (2 * t + of) * PITCH + 64 * h + 8 * g + 2 * j) =
              make_float4(out[h][j][of], out[h][j][of + 2], out[h][j + 1][of], out[h][j + 1][of + 2]);
        }
      }
    }
  }
  if (t == 0 && g < s.group)
    *reinterpret_cast<float2*>(of_warp_heads + g * PITCH + HEAD_DIM) = make_float2(largest, sum);
  sync();
  // A lane for each warp and head: how much its part counts.
  const int of_head = lane % kDecodeMaxGroup;
  float2 state = make_float2(-INFINITY, 0.0f);
  if (of_head < s.group) {
    state = *reinterpret_cast<const float2*>(partials + (lane / kDecodeMaxGroup * kDecodeMaxGroup + of_head) * PITCH +
                                             HEAD_DIM);
  }
  float most = state.x;
#pragma unroll
  for (int distance = kDecodeMaxGroup; distance < 32; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
  }
  const float weight = state.y == 0.0f ? 0.0f : exp2_approx(state.x - most);  // 0: it had no key
  float total = weight * state.y;
#pragma unroll
  for (int distance = kDecodeMaxGroup; distance < 32; distance *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, distance);
  }
#pragma unroll 1
  for (int first = 0; first < s.group * (HEAD_DIM / 2); first += kThreads) {
    const int i = first + thread, head = i / (HEAD_DIM / 2), pair = i % (HEAD_DIM / 2);
    float2 all = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float of_warp = __shfl_sync(0xffffffffu, weight, w * kDecodeMaxGroup + head % kDecodeMaxGroup);
      const float2 part = *reinterpret_cast<const float2*>(
          partials + (w * kDecodeMaxGroup + head % kDecodeMaxGroup) * PITCH + 2 * pair);
      all.x += of_warp * part.x;
      all.y += of_warp * part.y;
    }
    const float of_all = __shfl_sync(0xffffffffu, most, head % kDecodeMaxGroup);
    const float sum_of_all = __shfl_sync(0xffffffffu, total, head % kDecodeMaxGroup);
    if (head >= s.group) continue;
    if (mine.is_all) {
      const float factor = __fdividef(1.0f, sum_of_all);
      const int at = mine.token * s.out_columns + (mine.kv_head * s.group + head) * HEAD_DIM + 2 * pair;
      hand_over(workspace() + buffers.a + at, pack_pair<T>(all.x * factor, all.y * factor), mark);
    } else {
      uint32_t* const target = partial_of(mine.token, mine.kv_head * s.group + head, mine.split);
      hand_over(target + 4 * pair, all.x, all.y, mark);
      if (pair == 0) hand_over(target + 4 * (HEAD_DIM / 2), of_all, sum_of_all, mark);
    }
  }
}

// A CTA for each head of a token, a warp for every eighth of its parts. What it leaves in shared memory nobody writes
// before the next barrier of all: the product behind it has one.
template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::merge() {
  constexpr int PAIRS = HEAD_DIM / 64, PARTS = kMaxSplits / kWarps;
  forget();
  const int of_token = part().merged_token, head = part().merged_head, merged_parts = part().merged_parts;
  if (merged_parts < 0) return;
  constexpr int PITCH = (HEAD_DIM / 2 + 1) * 4;  // words of a part
  const uint32_t* const first_part = partial_of(of_token, head, 0);
  const uint32_t* const mine = first_part + warp * PITCH + 4 * lane;
  uint4 early[PARTS][PAIRS];
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      early[i][j] =
          make_uint4(0, 0, 0, 0);  // else the compiler keeps, in local memory, what was there in the layer before
      if (warp + i * kWarps < merged_parts) early[i][j] = look(mine + i * kWarps * PITCH + 128 * j);
    }
  }
  float2 state = make_float2(-INFINITY, 0.0f);
  if (lane < merged_parts) {
    const uint32_t* source = first_part + lane * PITCH + PITCH - 4;
    const uint2 words = take(source, mark, look(source));
    state = make_float2(__uint_as_float(words.x), __uint_as_float(words.y));
  }
  const float most = warp_reduce(state.x, [](float a, float b) { return fmaxf(a, b); });
  const float weight = lane < merged_parts ? exp2_approx(state.x - most) : 0.0f;
  const float total = warp_reduce(weight * state.y, [](float a, float b) { return a + b; });
  float2 out[PAIRS] = {};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    if (warp + i * kWarps >= merged_parts) break;
    const float counts = __shfl_sync(0xffffffffu, weight, warp + i * kWarps);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const uint2 words = take(mine + i * kWarps * PITCH + 128 * j, mark, early[i][j]);
      out[j].x += counts * __uint_as_float(words.x);
      out[j].y += counts * __uint_as_float(words.y);
    }
  }
  float2* const partials = reinterpret_cast<float2*>(smem + layout.merged);
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) partials[warp * (HEAD_DIM / 2) + lane + 32 * j] = out[j];
  sync();
  if (warp < PAIRS) {
    float2 all = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = partials[w * (HEAD_DIM / 2) + thread];
      all.x += part.x;
      all.y += part.y;
    }
    const float factor = merged_parts > 0 ? __fdividef(1.0f, total) : 0.0f;
    const int at = of_token * s.out_columns + head * HEAD_DIM + 2 * thread;
    hand_over(workspace() + buffers.a + at, pack_pair<T>(all.x * factor, all.y * factor), mark);
  }
}

}  // namespace
}  // namespace fastattn
