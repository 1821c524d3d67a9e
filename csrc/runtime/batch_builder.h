// Every per-step array, written straight into one (pinned) buffer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/token_sequence.h"

namespace fastattn {

struct BatchInfo {
  int64_t num_tokens = 0;
  int64_t num_seqs = 0;
  int64_t num_logits = 0;
  int64_t max_seqlen_q = 0;
  int64_t max_seqlen_k = 0;
  int64_t nbytes = 0;  // the prefix of the buffer that is in use
};

class BatchBuilder {
 public:
  struct Field {
    std::string name;
    std::string dtype;  // numpy's name
    std::vector<int64_t> shape;
    int64_t offset;  // bytes
  };

  BatchBuilder(int64_t max_num_tokens, int64_t max_num_seqs, int64_t max_blocks_per_seq, int64_t block_size,
               int64_t max_logits_per_seq);

  // num_tokens[i] tokens of sequences[i], its drafts after its own: the last of its own and each draft get a row of
  // logits. Then pad_num_seqs rows that share pad_num_tokens tokens evenly, which write nothing and see nothing.
  // With `cascade` one more row is what they share: all tokens as one sequence's, and the first num_shared_blocks
  // blocks, which each sequence must have, before its first token here; its own row begins behind them.
  BatchInfo build(uintptr_t address, const std::vector<const TokenSequence*>& sequences,
                  const std::vector<int64_t>& num_tokens, int64_t pad_num_seqs, int64_t pad_num_tokens, bool cascade,
                  int64_t num_shared_blocks) const;

  int64_t nbytes() const { return nbytes_; }
  const std::vector<Field>& layout() const { return fields_; }

 private:
  void validate(uintptr_t address, const std::vector<const TokenSequence*>& sequences,
                const std::vector<int64_t>& num_tokens, int64_t pad_num_seqs, int64_t pad_num_tokens, bool cascade,
                int64_t num_shared_blocks) const;
  template <typename T>
  T* at(uintptr_t address, const char* name) const;

  int64_t max_num_tokens_, max_num_seqs_, max_blocks_per_seq_, block_size_, max_logits_per_seq_;
  int64_t nbytes_ = 0;
  std::vector<Field> fields_;
};

}  // namespace fastattn
