// The language model's head in the kernel for a decoder's layers (decode_layers_sm90.cuh): logits of what the last
// layer left. Included behind the kernel's struct.
#pragma once

namespace fastattn {
namespace {

// What the last layer left, normalized and rounded as rms_norm does it, to where a product finds what it multiplies.
template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::receive_normalized() {
  // A warp without columns waits for nobody's, and where the CTA has no rows of down, others may still need the sums
  // of squares that it is about to overwrite.
  sync();
  const uint32_t* const buffer = workspace() + products[kHead].buffer;
  const auto words_of = [&](int column, int token) {
    return reinterpret_cast<uint32_t*>(smem + layout.x + token * x_pitch(s.n) + 2 * column) + thread / 2 * 4 +
           thread % 2;
  };
  const auto each = [&](auto&& what) {
#pragma unroll 1
    for (int column = 0; column + 4 * thread < s.n; column += kStageColumns) {
#pragma unroll
      for (int token = 0; token < MOST_TOKENS; ++token) {
        if (token < num_tokens) what(column, token);
      }
    }
  };
  float sums[MOST_TOKENS] = {};
  each([&](int column, int token) {
    const uint32_t* const source = buffer + token * s.n + column + 4 * thread;
    const uint2 taken = take(source, mark, look(source));
    words_of(column, token)[0] = taken.x;
    words_of(column, token)[2] = taken.y;
    const float2 a = unpack_pair<T>(taken.x), b = unpack_pair<T>(taken.y);
    sums[token] += (a.x * a.x + a.y * a.y) + (b.x * b.x + b.y * b.y);
  });
#pragma unroll
  for (int token = 0; token < MOST_TOKENS; ++token) {
    const float sum = warp_reduce(sums[token], [](float a, float b) { return a + b; });
    if (lane == 0) squares()[warp * kDecodeMaxTokens + token] = sum;
  }
  sync();
  float factors[MOST_TOKENS];
#pragma unroll
  for (int token = 0; token < MOST_TOKENS; ++token) factors[token] = norm_factor(token);
  each([&](int column, int token) {
    float weight[4];
    load_vec<4>(static_cast<const T*>(p.final_norm) + column + 4 * thread, weight);
    uint32_t* const words = words_of(column, token);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack_pair<T>(words[2 * i]);
      words[2 * i] = pack_pair<T>(pair.x * factors[token] * weight[2 * i], pair.y * factors[token] * weight[2 * i + 1]);
    }
  });
  sync();
}

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::make_logits() {
  forget();
  receive_normalized();
  const Product& product = products[kHead];
#pragma unroll 1
  for (int item = first_item(product); item < product.items;) {
    const int count = multiply_items<false>(product, item, nullptr, 0, false);
    sync();
    const int row = thread % 4 * 2, of_token = thread / 4 % MOST_TOKENS;
    const int index = thread / (4 * MOST_TOKENS);
    if (index < count && of_token < num_tokens) {
      const float2 sum = sum_of_warps(index, of_token, row);
      T* const target = static_cast<T*>(p.logits) + int64_t{of_token} * p.vocab_size;
      *reinterpret_cast<uint32_t*>(target + (item + index * ctas) * kUnit + row) = pack_pair<T>(sum.x, sum.y);
    }
    sums_turn ^= 1;
    item += count * ctas;
  }
}

}  // namespace
}  // namespace fastattn
