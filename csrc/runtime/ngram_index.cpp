#include "runtime/ngram_index.h"

#include <algorithm>

#include "runtime/checks.h"

namespace fastattn {

namespace {

// One more token in front. splitmix64's finalizer: every bit of the input moves every bit of the result.
uint64_t mix(uint64_t hash, int32_t token) {
  hash += 0x9e3779b97f4a7c15ULL * (static_cast<uint64_t>(static_cast<uint32_t>(token)) + 1);
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9ULL;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebULL;
  return hash ^ (hash >> 31);
}

}  // namespace

NgramIndex::NgramIndex(int64_t min_n, int64_t max_n) : min_n_(min_n), max_n_(max_n) {
  if (min_n < 1) refuse("NgramIndex: min_n is ", min_n, ", allowed is 1 or more");
  if (max_n < min_n || max_n > 64) refuse("NgramIndex: max_n is ", max_n, ", allowed is min_n = ", min_n, " to 64");
  ends_.resize(max_n - min_n + 1);
}

void NgramIndex::extend(const std::vector<int32_t>& tokens) {
  for (int32_t token : tokens) {
    if (token < 0) refuse("NgramIndex.extend: token is ", token, ", allowed is 0 to 2**31 - 1");
  }
  for (int32_t token : tokens) {
    tokens_.push_back(token);
    const int64_t end = size();
    uint64_t hash = 0;
    for (int64_t n = 1; n <= std::min(max_n_, end); ++n) {
      hash = mix(hash, tokens_[end - n]);
      if (n < min_n_) continue;
      Ends& ends = ends_[n - min_n_][hash];
      ends.before = ends.last;
      ends.last = end;
    }
  }
}

std::vector<int32_t> NgramIndex::propose(int64_t max_tokens) const {
  if (max_tokens < 0) refuse("NgramIndex.propose: max_tokens is ", max_tokens, ", allowed is 0 or more");
  const int64_t end = size();
  std::vector<uint64_t> hashes{0};
  for (int64_t n = 1; n <= std::min(max_n_, end); ++n) hashes.push_back(mix(hashes.back(), tokens_[end - n]));
  for (int64_t n = static_cast<int64_t>(hashes.size()) - 1; n >= min_n_; --n) {
    const auto found = ends_[n - min_n_].find(hashes[n]);
    if (found == ends_[n - min_n_].end()) continue;
    const int64_t earlier = found->second.before;
    if (earlier == 0 || !same(earlier, end, n)) continue;
    // Past the end of the text the continuation is its own: "abab" goes on "abab", however much is wanted.
    std::vector<int32_t> found_tokens(max_tokens);
    for (int64_t i = 0; i < max_tokens; ++i) {
      found_tokens[i] = earlier + i < end ? tokens_[earlier + i] : found_tokens[earlier + i - end];
    }
    return found_tokens;
  }
  return {};
}

bool NgramIndex::same(int64_t end_a, int64_t end_b, int64_t n) const {
  return std::equal(tokens_.begin() + (end_a - n), tokens_.begin() + end_a, tokens_.begin() + (end_b - n));
}

}  // namespace fastattn
