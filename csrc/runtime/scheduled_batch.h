// What every step does with each of its sequences, for all of them in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "runtime/block_pool.h"
#include "runtime/token_sequence.h"

namespace fastattn {

// num_tokens[i] tokens of sequences[i] are computed. What it says of them is what they were when it was made; what it
// does, it does to what they are by then: one that lost its blocks since, or has ended, is passed over.
class ScheduledBatch {
 public:
  using Sequences = std::vector<std::shared_ptr<TokenSequence>>;
  using Indices = std::vector<int64_t>;

  ScheduledBatch(Sequences sequences, std::vector<int64_t> num_tokens);
  // One token of each that has exactly one to compute and no drafts, and the indices of the others.
  static std::pair<ScheduledBatch, Indices> of_decodes(const Sequences& sequences);

  int64_t size() const { return static_cast<int64_t>(sequences_.size()); }
  const std::vector<TokenSequence*>& sequences() const { return pointers_; }
  const std::vector<int64_t>& num_tokens() const { return num_tokens_; }
  int64_t total_tokens() const { return total_tokens_; }
  uint32_t needs() const { return needs_; }              // of all together
  uint32_t draw_needs() const { return draw_needs_; }    // of those in draws()
  bool only_decodes() const { return only_decodes_; }    // each has one token to compute, drafts apart
  const Indices& prefills() const { return prefills_; }  // those that are not at their last token, or in the prompt
  const Indices& draws() const { return draws_; }        // those whose next token is drawn, in the order of rows
  const Indices& num_drafted() const { return num_drafted_; }  // of each of draws()

  // The first blocks that are the same in all sequences and full of computed tokens; 0 where to read them once, and not
  // for each, spares fewer than least_keys keys, or where there are fewer than least_seqs sequences.
  int64_t num_shared_blocks(int64_t block_size, int64_t least_keys, int64_t least_seqs) const;
  // Counts the tokens as computed, drafts apart. Returns who filled a block with them.
  Indices advance(int64_t block_size);
  // What draws() draw is a token of theirs, though not known yet; but for the last one of all, after which nothing
  // comes.
  void append_unknown();
  // What `settle` did. watched: rows that it left to their owner, of a sequence that is watched or that ends with this
  // token, or without a token. streamed: of those that took their token the rows of which the owner wants to hear.
  struct Settled {
    Indices watched, streamed;
    int64_t num_settled = 0;
  };

  // Says what they drew, where there were no drafts: drawn[row], negative if nothing could be.
  Settled settle(const std::vector<int32_t>& drawn);

 private:
  Sequences sequences_;
  std::vector<TokenSequence*> pointers_;
  std::vector<int64_t> num_tokens_;
  Indices prefills_, draws_, num_drafted_;
  int64_t total_tokens_ = 0;
  uint32_t needs_ = 0, draw_needs_ = 0;
  bool only_decodes_ = true;
};

}  // namespace fastattn
