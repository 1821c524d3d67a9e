// Which keys a query token sees, as one contiguous range: lengths, causality and window at once.
#pragma once

#include <cstdint>

#include "attention/attention_params.h"

namespace fastattn {

// Keys begin <= j < end; empty if end <= begin.
struct KeyRange {
  int32_t begin;
  int32_t end;
};

// The mask is aligned bottom-right: the last query token stands at the last key. Token i is at
// position i + k_len - q_len and sees the keys from position - left to position + right, both
// inclusive; a negative bound is open, and bounds are at most kMaxWindow, so that sums stay within
// int32. Causal is right = 0.
//
//            keys 0 1 2 3 4 5                          keys 0 1 2 3 4 5
//   token 0       x x x x . .     (causal,    token 0       . . x x . .    (left = 1,
//   token 1       x x x x x .      q_len 3,   token 1       . . . x x .     right = 0)
//   token 2       x x x x x x      k_len 6)   token 2       . . . . x x
struct AttentionMask {
  int32_t q_len;
  int32_t k_len;
  int32_t window_left;
  int32_t window_right;

  __device__ __forceinline__ KeyRange visible(int32_t token) const {
    const int32_t position = token + k_len - q_len;
    KeyRange range = {0, k_len};
    if (window_left >= 0) range.begin = max(0, position - window_left);
    if (window_right >= 0) range.end = min(k_len, position + window_right + 1);
    return range;
  }
};

}  // namespace fastattn
