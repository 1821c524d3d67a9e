// Reference-counted ids of KV-cache blocks.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/token_sequence.h"

namespace fastattn {

// Hands out block ids 0 … num_blocks − 1. A block is free exactly when its count is 0; it is then on the free list
// once.
class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  // `n` blocks with one reference each, or nothing at all if fewer are free.
  std::optional<std::vector<int32_t>> allocate(int64_t n);
  // A block more for each sequence whose blocks are full, for its next token. Returns how many blocks are missing for
  // that: 0, or nothing was changed.
  int64_t grow(const std::vector<TokenSequence*>& sequences, int64_t block_size);
  void retain(const std::vector<int32_t>& blocks);
  // Returns how many became free. Refuses, with nothing changed, a block that has too few references.
  int64_t release(const std::vector<int32_t>& blocks);

  int32_t ref_count(int64_t block) const;
  int64_t num_blocks() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  void check() const;

 private:
  void require_valid(const char* call, int64_t block) const;

  std::vector<int32_t> ref_counts_;
  std::vector<int32_t> free_;  // a stack: the block that was freed last is the likeliest to be in a cache
};

}  // namespace fastattn
