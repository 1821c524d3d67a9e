#include "runtime/block_pool.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "runtime/checks.h"

namespace fastattn {

BlockPool::BlockPool(int64_t num_blocks) {
  if (num_blocks < 1 || num_blocks > std::numeric_limits<int32_t>::max()) {
    refuse("BlockPool: num_blocks is ", num_blocks, ", allowed is 1 to 2**31 - 1");
  }
  ref_counts_.assign(num_blocks, 0);
  free_.resize(num_blocks);
  std::iota(free_.rbegin(), free_.rend(), 0);  // block 0 is handed out first
}

std::optional<std::vector<int32_t>> BlockPool::allocate(int64_t n) {
  if (n < 0) refuse("BlockPool.allocate: n is ", n, ", allowed is 0 or more");
  if (n > num_free()) return std::nullopt;
  std::vector<int32_t> blocks(free_.rbegin(), free_.rbegin() + n);
  free_.resize(free_.size() - n);
  for (int32_t block : blocks) ref_counts_[block] = 1;
  return blocks;
}

int64_t BlockPool::grow(const std::vector<TokenSequence*>& sequences, int64_t block_size) {
  if (block_size < 1) refuse("BlockPool.grow: block_size is ", block_size, ", allowed is 1 or more");
  const auto is_full = [&](const TokenSequence* seq) {
    return seq->num_computed() >= static_cast<int64_t>(seq->blocks().size()) * block_size;
  };
  const int64_t needed = std::count_if(sequences.begin(), sequences.end(), is_full);
  if (needed > num_free()) return needed - num_free();
  for (TokenSequence* seq : sequences) {
    if (is_full(seq)) seq->add_blocks(*allocate(1));
  }
  return 0;
}

void BlockPool::retain(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) {
    require_valid("retain", block);
    if (ref_counts_[block] == 0) refuse("BlockPool.retain: block ", block, " is free");
  }
  for (int32_t block : blocks) ++ref_counts_[block];
}

int64_t BlockPool::release(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) require_valid("release", block);
  int64_t num_freed = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (ref_counts_[blocks[i]] == 0) {
      // A block may stand in the list more than once, so only now is it known that there are too few: take it all back.
      for (size_t j = i; j-- > 0;) {
        if (ref_counts_[blocks[j]]++ == 0) free_.pop_back();
      }
      refuse("BlockPool.release: block ", blocks[i], " has fewer references than are released");
    }
    if (--ref_counts_[blocks[i]] == 0) {
      free_.push_back(blocks[i]);
      ++num_freed;
    }
  }
  return num_freed;
}

int32_t BlockPool::ref_count(int64_t block) const {
  require_valid("ref_count", block);
  return ref_counts_[block];
}

void BlockPool::check() const {
  std::vector<bool> seen(ref_counts_.size(), false);
  for (int32_t block : free_) {
    invariant(!seen[block], "block ", block, " is on the free list twice");
    invariant(ref_counts_[block] == 0, "free block ", block, " has references");
    seen[block] = true;
  }
  for (size_t block = 0; block < ref_counts_.size(); ++block) {
    invariant(ref_counts_[block] >= 0, "block ", block, " has a negative count");
    invariant(seen[block] == (ref_counts_[block] == 0), "block ", block, " is neither free nor used");
  }
}

void BlockPool::require_valid(const char* call, int64_t block) const {
  if (block < 0 || block >= num_blocks()) {
    refuse("BlockPool.", call, ": block is ", block, ", allowed is 0 to ", num_blocks() - 1);
  }
}

}  // namespace fastattn
