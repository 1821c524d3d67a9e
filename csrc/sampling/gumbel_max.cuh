// Sampling as an arg-max: the largest logit + temperature * g, with independent g of Gumbel's distribution, is a draw
// from softmax(logits / temperature) (https://arxiv.org/abs/1411.0030). A part of the row is enough to say which
// of its tokens it can be, so that logits need not be kept, and without a division a temperature may be 0, which is
// greedy, or tiny.
//
// What is known of a part of a row, a choice, is one integer, and the better of two is a maximum:
//
//   63                        32 31                        1  0
//   ┌───────────────────────────┬───────────────────────────┬───┐
//   │ ordered(score)            │ 2^31 - 1 - id             │ f │     f: some logit is finite
//   └───────────────────────────┴───────────────────────────┴───┘
#pragma once

#include <cmath>
#include <cstdint>

#include "arch/vec.cuh"
#include "sampling/order.cuh"
#include "sampling/philox.cuh"

namespace fastattn {

// How a row's tokens are drawn. The four noises that a call makes belong to ids 4i to 4i + 3.
struct GumbelRow {
  float temperature;
  uint64_t seed, position;

  // Of temperatures above the largest, the noise would be infinite; logits are nothing beside it either way.
  __device__ __forceinline__ static GumbelRow of(const float* temperature, const int64_t* seed, const int64_t* position,
                                                 int64_t row) {
    return {fminf(temperature[row], 1e36f), static_cast<uint64_t>(seed[row]), static_cast<uint64_t>(position[row])};
  }

  // -log(E) with E of the exponential distribution, so that the noise is finite: E is 2^-33 to 17.
  __device__ __forceinline__ static float noise(uint32_t word) {
    const float u = fminf(__fmaf_rn(static_cast<float>(word), 0x1p-32f, 0x1p-33f), 0x1.fffffep-1f);
    return -logf(-log1pf(-u));
  }

  // scores: logits of tokens id to id + 3, id a multiple of 4. `sample` has the counters whose upper half is 0.
  __device__ __forceinline__ void add_noise(float (&scores)[4], int32_t id) const {
    if (temperature <= 0.0f) return;
    const uint4 words = philox_words(seed, position, static_cast<uint32_t>(id) / 4, 1);
    scores[0] = __fmaf_rn(temperature, noise(words.x), scores[0]);
    scores[1] = __fmaf_rn(temperature, noise(words.y), scores[1]);
    scores[2] = __fmaf_rn(temperature, noise(words.z), scores[2]);
    scores[3] = __fmaf_rn(temperature, noise(words.w), scores[3]);
  }
};

constexpr uint64_t kNoChoice = 0;

__device__ __forceinline__ uint64_t choice_of(float logit, float score, int32_t id) {
  const uint32_t order = score == score ? ordered(score) : 0xffffffffu;  // a NaN above all
  const uint32_t rest = (0x7fffffffu - static_cast<uint32_t>(id)) << 1 | (fabsf(logit) < INFINITY ? 1u : 0u);
  return static_cast<uint64_t>(order) << 32 | rest;
}

// Ids differ, so that the lowest bit, which it has of both, never decides.
__device__ __forceinline__ uint64_t better_choice(uint64_t a, uint64_t b) { return (a > b ? a : b) | ((a | b) & 1); }

__device__ __forceinline__ float score_of_choice(uint64_t choice) { return ranked_value(choice); }

// As in `sample`, -1 for a row with a NaN or without a finite logit.
__device__ __forceinline__ int32_t token_of_choice(uint64_t choice) {
  const float score = score_of_choice(choice);
  if (score != score || (choice & 1) == 0) return -1;
  return static_cast<int32_t>(0x7fffffffu - (static_cast<uint32_t>(choice) >> 1));
}

// The best of four tokens from id on, a multiple of 4, by their logits, of which num_ids are there.
__device__ __forceinline__ uint64_t best_of_four(const GumbelRow& row, const float (&logits)[4], int32_t id,
                                                 int32_t num_ids = 4) {
  float scores[4] = {logits[0], logits[1], logits[2], logits[3]};
  row.add_noise(scores, id);
  uint64_t best = kNoChoice;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < num_ids) best = better_choice(best, choice_of(logits[i], scores[i], id + i));
  }
  return best;
}

}  // namespace fastattn
