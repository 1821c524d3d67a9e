// One request's tokens, the guesses at what comes next, KV blocks and sampling row.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace fastattn {

struct SamplingRow {
  float temperature = 0.0f;
  int32_t top_k = 0;
  float top_p = 1.0f;
  float min_p = 0.0f;
  int64_t seed = 0;
};

// Lives in C++ so that building a step's arrays touches no Python object per token.
class TokenSequence {
 public:
  explicit TokenSequence(std::vector<int32_t> token_ids);

  void append(int32_t token) { extend({token}); }
  void extend(const std::vector<int32_t>& tokens);
  void truncate(int64_t length);
  // A token that a step is still drawing: it counts as one, and the device knows it as the row-th that the step drew.
  // settle says which it was; nothing can follow it before.
  void append_unknown(int32_t row);
  void settle(int32_t token);
  bool has_unknown() const { return !tokens_.empty() && tokens_.back() < 0; }
  // Nothing is drawn for it any more: a token that is not known yet is none of its tokens, and settle is not called.
  void end();
  bool has_ended() const { return has_ended_; }
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }
  std::vector<int32_t> slice(int64_t start, int64_t end) const;  // end −1: to the end
  const std::vector<int32_t>& tokens() const { return tokens_; }
  // What it was made with is the prompt; what is known of the rest are its outputs.
  int64_t num_prompt() const { return num_prompt_; }
  int64_t num_outputs() const { return size() - num_prompt_ - has_unknown(); }
  // Its output ends with the max_outputs-th token, or with one of these.
  void set_ends(int64_t max_outputs, std::vector<int32_t> stop_token_ids);
  bool ends_with(int32_t token) const;
  int64_t max_outputs() const { return max_outputs_; }

  // Guesses at the tokens that come next, for a step to verify. They are no part of tokens(), so nothing that reads
  // those (the prefix tree) can take a guess for a fact. Gone as soon as the tokens change.
  void set_drafts(const std::vector<int32_t>& tokens);
  const std::vector<int32_t>& drafts() const { return drafts_; }

  int64_t num_computed() const { return num_computed_; }
  int64_t num_pending() const { return size() - num_computed_; }
  void set_num_computed(int64_t num_computed);

  const std::vector<int32_t>& blocks() const { return blocks_; }
  int32_t max_block() const { return max_block_; }  // the largest id among them, −1 without any
  void add_blocks(const std::vector<int32_t>& blocks);
  // Hands its blocks over; without them nothing is computed any more, and nothing can be verified.
  std::vector<int32_t> take_blocks();

  const SamplingRow& sampling() const { return sampling_; }
  void set_sampling(double temperature, int64_t top_k, double top_p, double min_p, int64_t seed);

  // Bits that say what a step must do for it beyond the common; a batch has those of all. Their meaning is the
  // engine's.
  uint32_t needs = 0;
  // Its owner looks at every token that is drawn for it, before it is one of its tokens; or hears of it afterwards.
  bool is_watched = true, is_streamed = false;

 private:
  std::vector<int32_t> tokens_;  // the last may be −1 − row, a token that is not known yet
  std::vector<int32_t> drafts_;
  std::vector<int32_t> blocks_;
  std::vector<int32_t> stop_token_ids_;  // sorted
  int64_t num_prompt_ = 0;
  int64_t max_outputs_ = std::numeric_limits<int64_t>::max();
  int64_t num_computed_ = 0;
  int32_t max_block_ = -1;
  bool has_ended_ = false;
  SamplingRow sampling_;
};

}  // namespace fastattn
