#include "runtime/scheduled_batch.h"

#include <algorithm>

#include "runtime/checks.h"

namespace fastattn {

ScheduledBatch::ScheduledBatch(Sequences sequences, std::vector<int64_t> num_tokens)
    : sequences_(std::move(sequences)), num_tokens_(std::move(num_tokens)) {
  if (sequences_.size() != num_tokens_.size()) {
    refuse("ScheduledBatch: num_tokens has ", num_tokens_.size(), " entries, expected ", sequences_.size());
  }
  pointers_.reserve(sequences_.size());
  for (int64_t i = 0; i < size(); ++i) {
    TokenSequence* seq = sequences_[i].get();
    if (seq == nullptr) refuse("ScheduledBatch: sequences[", i, "] is None");
    if (num_tokens_[i] < 1) refuse("ScheduledBatch: num_tokens[", i, "] is ", num_tokens_[i], ", allowed is 1 or more");
    pointers_.push_back(seq);
    total_tokens_ += num_tokens_[i];
    needs_ |= seq->needs;
    const int64_t pending = seq->num_pending();
    if (pending != 1) only_decodes_ = false;
    if (pending != 1 || seq->num_computed() < seq->num_prompt()) prefills_.push_back(i);
    if (num_tokens_[i] >= pending) {
      draws_.push_back(i);
      draw_needs_ |= seq->needs;
      num_drafted_.push_back(num_tokens_[i] - pending);
    }
  }
}

std::pair<ScheduledBatch, ScheduledBatch::Indices> ScheduledBatch::of_decodes(const Sequences& sequences) {
  Sequences decodes;
  Indices others;
  decodes.reserve(sequences.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i] == nullptr) refuse("ScheduledBatch.of_decodes: sequences[", i, "] is None");
    if (sequences[i]->num_pending() == 1 && sequences[i]->drafts().empty()) {
      decodes.push_back(sequences[i]);
    } else {
      others.push_back(static_cast<int64_t>(i));
    }
  }
  std::vector<int64_t> ones(decodes.size(), 1);
  return {ScheduledBatch(std::move(decodes), std::move(ones)), std::move(others)};
}

int64_t ScheduledBatch::num_shared_blocks(int64_t block_size, int64_t least_keys, int64_t least_seqs) const {
  if (block_size < 1 || least_keys < 1 || least_seqs < 2) {
    refuse("ScheduledBatch.num_shared_blocks: block_size is ", block_size, ", least_keys ", least_keys, ", least_seqs ",
           least_seqs, ", allowed are 1, 1 and 2 or more");
  }
  if (size() < least_seqs) return 0;
  const int64_t keys_of_block = (size() - 1) * block_size;
  const int64_t at_least = (least_keys + keys_of_block - 1) / keys_of_block;
  const std::vector<int32_t>& first = pointers_[0]->blocks();
  int64_t shared = static_cast<int64_t>(first.size());
  // The last block that is wanted tells most batches apart, before whole tables are read.
  for (const TokenSequence* seq : pointers_) {
    shared = std::min({shared, seq->num_computed() / block_size, static_cast<int64_t>(seq->blocks().size())});
    if (shared < at_least || seq->blocks()[at_least - 1] != first[at_least - 1]) return 0;
  }
  for (const TokenSequence* seq : pointers_) {
    const auto end = std::mismatch(first.begin(), first.begin() + shared, seq->blocks().begin()).first;
    shared = end - first.begin();
    if (shared < at_least) return 0;
  }
  return shared;
}

ScheduledBatch::Indices ScheduledBatch::advance(int64_t block_size) {
  if (block_size < 1) refuse("ScheduledBatch.advance: block_size is ", block_size, ", allowed is 1 or more");
  Indices filled;
  for (int64_t i = 0; i < size(); ++i) {
    TokenSequence* seq = pointers_[i];
    if (seq->blocks().empty()) continue;
    const int64_t before = seq->num_computed();
    const int64_t now = before + std::min(num_tokens_[i], seq->num_pending());
    seq->set_num_computed(now);
    if (now / block_size > before / block_size) filled.push_back(i);
  }
  return filled;
}

void ScheduledBatch::append_unknown() {
  for (size_t row = 0; row < draws_.size(); ++row) {
    TokenSequence* seq = pointers_[draws_[row]];
    if (seq->blocks().empty() || seq->has_ended() || seq->num_outputs() + 1 >= seq->max_outputs()) continue;
    seq->append_unknown(static_cast<int32_t>(row));
  }
}

ScheduledBatch::Settled ScheduledBatch::settle(const std::vector<int32_t>& drawn) {
  if (drawn.size() != draws_.size()) {
    refuse("ScheduledBatch.settle: drawn has ", drawn.size(), " tokens, expected ", draws_.size());
  }
  Settled found;
  for (size_t row = 0; row < draws_.size(); ++row) {
    TokenSequence* seq = pointers_[draws_[row]];
    if (seq->has_ended()) continue;
    if (seq->is_watched || drawn[row] < 0 || seq->ends_with(drawn[row])) {
      found.watched.push_back(static_cast<int64_t>(row));
      continue;
    }
    seq->has_unknown() ? seq->settle(drawn[row]) : seq->append(drawn[row]);
    ++found.num_settled;
    if (seq->is_streamed) found.streamed.push_back(static_cast<int64_t>(row));
  }
  return found;
}

}  // namespace fastattn
