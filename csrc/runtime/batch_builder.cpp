#include "runtime/batch_builder.h"

#include <algorithm>
#include <limits>

#include "runtime/checks.h"

namespace fastattn {

BatchBuilder::BatchBuilder(int64_t max_num_tokens, int64_t max_num_seqs, int64_t max_blocks_per_seq, int64_t block_size,
                           int64_t max_logits_per_seq)
    : max_num_tokens_(max_num_tokens),
      max_num_seqs_(max_num_seqs),
      max_blocks_per_seq_(max_blocks_per_seq),
      block_size_(block_size),
      max_logits_per_seq_(max_logits_per_seq) {
  const auto require = [](const char* name, int64_t value) {
    if (value < 1 || value > (1 << 28)) refuse("BatchBuilder: ", name, " is ", value, ", allowed is 1 to 2**28");
  };
  require("max_num_tokens", max_num_tokens);
  require("max_num_seqs", max_num_seqs);
  require("max_blocks_per_seq", max_blocks_per_seq);
  require("block_size", block_size);
  require("max_logits_per_seq", max_logits_per_seq);
  if (max_num_seqs * max_blocks_per_seq > (int64_t{1} << 30)) {
    refuse("BatchBuilder: max_num_seqs * max_blocks_per_seq is ", max_num_seqs * max_blocks_per_seq,
           ", allowed is up to 2**30");
  }
  const int64_t max_num_logits = max_num_seqs * max_logits_per_seq;
  if (max_num_logits > (int64_t{1} << 28)) {
    refuse("BatchBuilder: max_num_seqs * max_logits_per_seq is ", max_num_logits, ", allowed is up to 2**28");
  }
  const auto add = [this](const char* name, const char* dtype, int64_t item_bytes, std::vector<int64_t> shape) {
    int64_t bytes = item_bytes;
    for (int64_t size : shape) bytes *= size;
    fields_.push_back({name, dtype, std::move(shape), nbytes_});
    nbytes_ += (bytes + 15) / 16 * 16;  // the next array starts aligned for 16-byte loads
  };
  for (const char* name : {"token_ids", "positions", "slot_mapping"}) add(name, "int32", 4, {max_num_tokens});
  // One more sequence is what all share: its two ends stand behind those of the others.
  add("cu_seqlens_q", "int32", 4, {max_num_seqs + 3});
  add("seqused_k", "int32", 4, {max_num_seqs + 1});
  for (const char* name : {"logits_indices", "top_k"}) add(name, "int32", 4, {max_num_logits});
  for (const char* name : {"temperature", "top_p", "min_p"}) add(name, "float32", 4, {max_num_logits});
  for (const char* name : {"seed", "sample_position"}) add(name, "int64", 8, {max_num_logits});
  // Last, because it is the largest: a step copies only the rows that it uses.
  add("block_table", "int32", 4, {max_num_seqs + 1, max_blocks_per_seq});
}

template <typename T>
T* BatchBuilder::at(uintptr_t address, const char* name) const {
  const auto field = std::find_if(fields_.begin(), fields_.end(), [&](const Field& f) { return f.name == name; });
  return reinterpret_cast<T*>(address + field->offset);
}

void BatchBuilder::validate(uintptr_t address, const std::vector<const TokenSequence*>& sequences,
                            const std::vector<int64_t>& num_tokens, int64_t pad_num_seqs, int64_t pad_num_tokens,
                            bool cascade, int64_t num_shared_blocks) const {
  if (address == 0 || address % 16 != 0)
    refuse("BatchBuilder.build: address is ", address, ", expected a multiple of 16");
  if (sequences.size() != num_tokens.size()) {
    refuse("BatchBuilder.build: num_tokens has ", num_tokens.size(), " entries, expected ", sequences.size());
  }
  const int64_t num_real = static_cast<int64_t>(sequences.size());
  if (pad_num_seqs < 0 || num_real > max_num_seqs_ || pad_num_seqs > max_num_seqs_ - num_real) {
    refuse("BatchBuilder.build: ", num_real, " sequences and pad_num_seqs ", pad_num_seqs, ", allowed are up to ",
           max_num_seqs_, " together");
  }
  if (pad_num_tokens < 0 || pad_num_tokens > pad_num_seqs * max_logits_per_seq_) {
    refuse("BatchBuilder.build: pad_num_tokens is ", pad_num_tokens, ", allowed is 0 to ",
           pad_num_seqs * max_logits_per_seq_, " with pad_num_seqs ", pad_num_seqs);
  }
  if (num_shared_blocks < 0 || num_shared_blocks > (cascade ? max_blocks_per_seq_ : 0)) {
    refuse("BatchBuilder.build: num_shared_blocks is ", num_shared_blocks, ", allowed is 0 to ",
           cascade ? max_blocks_per_seq_ : 0, cascade ? "" : " without cascade");
  }
  int64_t total = pad_num_tokens;
  for (int64_t i = 0; i < num_real; ++i) {
    const TokenSequence* seq = sequences[i];
    if (seq == nullptr) refuse("BatchBuilder.build: sequences[", i, "] is None");
    // A draft needs the token before it in the same step, whose logits decide about it.
    const int64_t own = seq->size() - seq->num_computed();
    const int64_t pending = own > 0 ? own + static_cast<int64_t>(seq->drafts().size()) : 0;
    if (num_tokens[i] < 1 || num_tokens[i] > pending) {
      refuse("BatchBuilder.build: num_tokens[", i, "] is ", num_tokens[i], ", allowed is 1 to ", pending);
    }
    if (num_tokens[i] - own + 1 > max_logits_per_seq_) {
      refuse("BatchBuilder.build: num_tokens[", i, "] has ", num_tokens[i] - own, " drafts, allowed are up to ",
             max_logits_per_seq_ - 1);
    }
    const int64_t num_needed = (seq->num_computed() + num_tokens[i] + block_size_ - 1) / block_size_;
    if (num_needed > static_cast<int64_t>(seq->blocks().size())) {
      refuse("BatchBuilder.build: sequences[", i, "] has ", seq->blocks().size(), " blocks, expected at least ",
             num_needed);
    }
    if (static_cast<int64_t>(seq->blocks().size()) > max_blocks_per_seq_) {
      refuse("BatchBuilder.build: sequences[", i, "] has ", seq->blocks().size(), " blocks, allowed are up to ",
             max_blocks_per_seq_);
    }
    if ((seq->max_block() + int64_t{1}) * block_size_ > std::numeric_limits<int32_t>::max()) {
      refuse("BatchBuilder.build: sequences[", i, "] has block ", seq->max_block(), ", whose slots do not fit 32 bits");
    }
    if (num_shared_blocks > 0) {
      if (num_shared_blocks > seq->num_computed() / block_size_) {
        refuse("BatchBuilder.build: num_shared_blocks is ", num_shared_blocks, ", allowed is up to ",
               seq->num_computed() / block_size_, ", which sequences[", i, "] has computed");
      }
      if (!std::equal(seq->blocks().begin(), seq->blocks().begin() + num_shared_blocks,
                      sequences[0]->blocks().begin())) {
        refuse("BatchBuilder.build: num_shared_blocks is ", num_shared_blocks, ", but the first blocks of sequences[",
               i, "] are not those of sequences[0]");
      }
    }
    total += num_tokens[i];
  }
  if (total > max_num_tokens_) {
    refuse("BatchBuilder.build: num_tokens sums to ", total, ", allowed is up to ", max_num_tokens_);
  }
}

BatchInfo BatchBuilder::build(uintptr_t address, const std::vector<const TokenSequence*>& sequences,
                              const std::vector<int64_t>& num_tokens, int64_t pad_num_seqs, int64_t pad_num_tokens,
                              bool cascade, int64_t num_shared_blocks) const {
  validate(address, sequences, num_tokens, pad_num_seqs, pad_num_tokens, cascade, num_shared_blocks);
  auto* token_ids = at<int32_t>(address, "token_ids");
  auto* positions = at<int32_t>(address, "positions");
  auto* slot_mapping = at<int32_t>(address, "slot_mapping");
  auto* cu_seqlens_q = at<int32_t>(address, "cu_seqlens_q");
  auto* seqused_k = at<int32_t>(address, "seqused_k");
  auto* logits_indices = at<int32_t>(address, "logits_indices");
  auto* top_k = at<int32_t>(address, "top_k");
  auto* temperature = at<float>(address, "temperature");
  auto* top_p = at<float>(address, "top_p");
  auto* min_p = at<float>(address, "min_p");
  auto* seed = at<int64_t>(address, "seed");
  auto* sample_position = at<int64_t>(address, "sample_position");
  auto* block_table = at<int32_t>(address, "block_table");

  BatchInfo info;
  const auto add_logits_row = [&](int64_t row, const SamplingRow& sampling, int64_t position) {
    const int64_t i = info.num_logits++;
    logits_indices[i] = static_cast<int32_t>(row);
    top_k[i] = sampling.top_k;
    temperature[i] = sampling.temperature;
    top_p[i] = sampling.top_p;
    min_p[i] = sampling.min_p;
    seed[i] = sampling.seed;
    sample_position[i] = position;
  };

  cu_seqlens_q[0] = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const TokenSequence& seq = *sequences[i];
    const int64_t start = seq.num_computed();
    const int64_t end = start + num_tokens[i];
    for (int64_t position = start; position < end; ++position, ++info.num_tokens) {
      const int64_t block = seq.blocks()[position / block_size_];
      token_ids[info.num_tokens] = position < seq.size() ? seq.tokens()[position] : seq.drafts()[position - seq.size()];
      positions[info.num_tokens] = static_cast<int32_t>(position);
      slot_mapping[info.num_tokens] = static_cast<int32_t>(block * block_size_ + position % block_size_);
      if (position >= seq.size() - 1) add_logits_row(info.num_tokens, seq.sampling(), position + 1);
    }
    int32_t* row = block_table + info.num_seqs * max_blocks_per_seq_;
    std::copy(seq.blocks().begin() + num_shared_blocks, seq.blocks().end(), row);
    seqused_k[info.num_seqs] = static_cast<int32_t>(end - num_shared_blocks * block_size_);
    cu_seqlens_q[++info.num_seqs] = static_cast<int32_t>(info.num_tokens);
    info.max_seqlen_q = std::max(info.max_seqlen_q, num_tokens[i]);
    info.max_seqlen_k = std::max(info.max_seqlen_k, end);
  }
  for (int64_t i = 0; i < pad_num_seqs; ++i) {
    const int64_t share = (i + 1) * pad_num_tokens / pad_num_seqs - i * pad_num_tokens / pad_num_seqs;
    for (int64_t j = 0; j < share; ++j, ++info.num_tokens) {
      token_ids[info.num_tokens] = 0;
      positions[info.num_tokens] = 0;
      slot_mapping[info.num_tokens] = -1;
      add_logits_row(info.num_tokens, SamplingRow{}, 0);
    }
    block_table[info.num_seqs * max_blocks_per_seq_] = 0;
    seqused_k[info.num_seqs] = 0;
    cu_seqlens_q[++info.num_seqs] = static_cast<int32_t>(info.num_tokens);
    info.max_seqlen_q = std::max(info.max_seqlen_q, share);
  }
  if (cascade) {
    cu_seqlens_q[info.num_seqs + 1] = 0;
    cu_seqlens_q[info.num_seqs + 2] = static_cast<int32_t>(info.num_tokens);
    seqused_k[info.num_seqs] = static_cast<int32_t>(num_shared_blocks * block_size_);
    int32_t* row = block_table + info.num_seqs * max_blocks_per_seq_;
    row[0] = 0;
    if (num_shared_blocks > 0) std::copy_n(sequences[0]->blocks().begin(), num_shared_blocks, row);
  }
  info.nbytes = fields_.back().offset + (info.num_seqs + cascade) * max_blocks_per_seq_ * int64_t{4};
  return info;
}

}  // namespace fastattn
