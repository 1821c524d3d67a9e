// Which keys a query token sees: lengths, causality and window at once, as one contiguous range, or a tree's path.
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

  // What any of the tokens first … last sees, and what all do: ranges move right with the token.
  __device__ __forceinline__ KeyRange seen_by_any(int32_t first, int32_t last) const {
    return {visible(first).begin, visible(last).end};
  }
  __device__ __forceinline__ KeyRange seen_by_all(int32_t first, int32_t last) const {
    return {visible(last).begin, visible(first).end};
  }

  struct Row {
    KeyRange visible;
    int32_t position;

    __device__ __forceinline__ bool sees(int32_t key) const { return key >= visible.begin && key < visible.end; }
    __device__ __forceinline__ int32_t distance(int32_t key) const { return abs(position - key); }
  };
  __device__ __forceinline__ Row row(int32_t token) const { return {visible(token), token + k_len - q_len}; }

  // q_start: the sequence's first query token.
  static __device__ __forceinline__ AttentionMask make(const AttentionParams& p, int32_t q_len, int32_t k_len,
                                                       int32_t /*q_start*/) {
    return {q_len, k_len, p.window_left, p.window_right};
  }
};

// A causal mask of query tokens that are the nodes of a tree: a token sees all keys before the query tokens and, of
// these, its ancestors and itself. Distances, to which windows and ALiBi refer, are along this path. A token of a
// longer sequence than trees can be has all before it on its path.
//
//   0 ─┬─ 1 ─── 3     keys 0 1 2 3 4 5
//      └─ 2           token 0  x x x . . .    (q_len 4, k_len 6)
//                     token 1  x x x x . .
//                     token 2  x x x . x .
//                     token 3  x x x x . x    its word is 0b1011
struct TreeMask : AttentionMask {
  const int64_t* words;  // of the sequence's query tokens; nullptr: no tree

  // A token's position on its path is at most that by its index, and the first one's is the same.
  __device__ __forceinline__ KeyRange seen_by_any(int32_t first, int32_t last) const {
    return AttentionMask::seen_by_any(words == nullptr ? first : 0, last);
  }
  __device__ __forceinline__ KeyRange seen_by_all(int32_t first, int32_t last) const {
    KeyRange range = AttentionMask::seen_by_all(first, last);
    if (words != nullptr) range.end = k_len - q_len;
    return range;
  }

  struct Row {
    uint64_t path;      // bit i: key first_key + i is on it, of which the last one is the token's own; all before are
    int32_t first_key;  // may be negative
    int32_t begin;      // of the window: behind first_key, the path has no keys outside

    __device__ __forceinline__ bool sees(int32_t key) const {
      const int32_t bit = key - first_key;
      if (bit < 0) return key >= begin;
      return bit < 64 && (path >> bit & 1) != 0;
    }
    // Of a key that it sees.
    __device__ __forceinline__ int32_t distance(int32_t key) const {
      const int32_t bit = key - first_key;
      return __popcll(path >> min(max(bit, 0), 63)) - 1 - min(bit, 0);
    }
  };
  __device__ __forceinline__ Row row(int32_t token) const {
    Row row = {~uint64_t{0}, token + k_len - q_len - 63, 0};
    if (words != nullptr && token < q_len) {
      const int32_t before = 63 - token;  // bits of keys before the query tokens
      row.path = static_cast<uint64_t>(words[token]) << before | ~(row.path << before) | uint64_t{1} << 63;
    }
    if (window_left >= 0) {
      row.begin = row.first_key - max(window_left + 1 - __popcll(row.path), 0);
      while (__popcll(row.path) > window_left + 1) row.path &= row.path - 1;
    }
    return row;
  }

  static __device__ __forceinline__ TreeMask make(const AttentionParams& p, int32_t q_len, int32_t k_len,
                                                  int32_t q_start) {
    return {AttentionMask::make(p, q_len, k_len, q_start), q_len <= kMaxTreeTokens ? p.tree_mask + q_start : nullptr};
  }
};

}  // namespace fastattn
