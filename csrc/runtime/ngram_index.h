// Prompt-lookup speculation: what followed the last time these tokens were seen.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace fastattn {

// For every n from min_n to max_n: n-gram → where it last ended. Keys are hashes, and tokens are compared on a hit, so
// a collision costs a miss, never a wrong match.
class NgramIndex {
 public:
  NgramIndex(int64_t min_n, int64_t max_n);

  void extend(const std::vector<int32_t>& tokens);  // O(max_n) a token
  // The max_tokens tokens that followed the latest earlier occurrence of the longest suffix that occurred before, and
  // where the text ends before that many, what follows if it goes on repeating; nothing if no suffix occurred before.
  std::vector<int32_t> propose(int64_t max_tokens) const;
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  bool same(int64_t end_a, int64_t end_b, int64_t n) const;

  int64_t min_n_, max_n_;
  std::vector<int32_t> tokens_;
  // [n − min_n]: hash of an n-gram → the ends of its last two occurrences (one past its last token; 0: none). Two,
  // because the newest is the suffix itself, and what is wanted is the one before it.
  struct Ends {
    int64_t last = 0, before = 0;
  };
  std::vector<std::unordered_map<uint64_t, Ends>> ends_;
};

}  // namespace fastattn
