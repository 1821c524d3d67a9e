#include "runtime/token_sequence.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "runtime/checks.h"

namespace fastattn {

namespace {

void require_tokens(const char* call, const std::vector<int32_t>& tokens) {
  for (int32_t token : tokens) {
    if (token < 0) refuse("TokenSequence", call, ": token is ", token, ", allowed is 0 to 2**31 - 1");
  }
}

}  // namespace

TokenSequence::TokenSequence(std::vector<int32_t> token_ids) {
  require_tokens("", token_ids);
  tokens_ = std::move(token_ids);
  num_prompt_ = size();
}

void TokenSequence::extend(const std::vector<int32_t>& tokens) {
  require_tokens(".extend", tokens);
  if (has_unknown()) refuse("TokenSequence.extend: the last token is not known yet, expected settle first");
  tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  drafts_.clear();
}

void TokenSequence::append_unknown(int32_t row) {
  if (row < 0) refuse("TokenSequence.append_unknown: row is ", row, ", allowed is 0 to 2**31 - 1");
  if (has_unknown()) refuse("TokenSequence.append_unknown: the last token is not known yet, expected settle first");
  tokens_.push_back(-1 - row);
  drafts_.clear();
}

void TokenSequence::settle(int32_t token) {
  require_tokens(".settle", {token});
  if (!has_unknown()) refuse("TokenSequence.settle: the last token is known, expected append_unknown first");
  tokens_.back() = token;
}

void TokenSequence::end() {
  has_ended_ = true;
  if (!has_unknown()) return;
  tokens_.pop_back();
  num_computed_ = std::min(num_computed_, size());
}

void TokenSequence::set_ends(int64_t max_outputs, std::vector<int32_t> stop_token_ids) {
  if (max_outputs < 1) refuse("TokenSequence.set_ends: max_outputs is ", max_outputs, ", allowed is 1 or more");
  require_tokens(".set_ends", stop_token_ids);
  max_outputs_ = max_outputs;
  stop_token_ids_ = std::move(stop_token_ids);
  std::sort(stop_token_ids_.begin(), stop_token_ids_.end());
}

bool TokenSequence::ends_with(int32_t token) const {
  return num_outputs() + 1 >= max_outputs_ || std::binary_search(stop_token_ids_.begin(), stop_token_ids_.end(), token);
}

void TokenSequence::truncate(int64_t length) {
  if (length < num_computed_ || length > size()) {
    refuse("TokenSequence.truncate: length is ", length, ", allowed is num_computed = ", num_computed_, " to ", size());
  }
  tokens_.resize(length);
  drafts_.clear();
}

void TokenSequence::set_drafts(const std::vector<int32_t>& tokens) {
  require_tokens(".drafts", tokens);
  drafts_ = tokens;
}

std::vector<int32_t> TokenSequence::slice(int64_t start, int64_t end) const {
  if (end == -1) end = size();
  if (start < 0 || start > end || end > size()) {
    refuse("TokenSequence.tokens: start is ", start, " and end ", end, ", allowed is 0 <= start <= end <= ", size());
  }
  return {tokens_.begin() + start, tokens_.begin() + end};
}

void TokenSequence::set_num_computed(int64_t num_computed) {
  if (num_computed < 0 || num_computed > size()) {
    refuse("TokenSequence: num_computed is ", num_computed, ", allowed is 0 to ", size());
  }
  num_computed_ = num_computed;
}

void TokenSequence::add_blocks(const std::vector<int32_t>& blocks) {
  for (int32_t block : blocks) {
    if (block < 0) refuse("TokenSequence.add_blocks: block is ", block, ", allowed is 0 or more");
  }
  blocks_.insert(blocks_.end(), blocks.begin(), blocks.end());
  for (int32_t block : blocks) max_block_ = std::max(max_block_, block);
}

std::vector<int32_t> TokenSequence::take_blocks() {
  num_computed_ = 0;
  drafts_.clear();
  max_block_ = -1;
  return std::exchange(blocks_, {});
}

void TokenSequence::set_sampling(double temperature, int64_t top_k, double top_p, double min_p, int64_t seed) {
  // Written so that NaN is refused too.
  if (!(temperature >= 0)) refuse("TokenSequence.set_sampling: temperature is ", temperature, ", allowed is 0 or more");
  if (!(top_p > 0 && top_p <= 1))
    refuse("TokenSequence.set_sampling: top_p is ", top_p, ", allowed is above 0, up to 1");
  if (!(min_p >= 0 && min_p <= 1)) refuse("TokenSequence.set_sampling: min_p is ", min_p, ", allowed is 0 to 1");
  if (top_k < 0 || top_k > std::numeric_limits<int32_t>::max()) {
    refuse("TokenSequence.set_sampling: top_k is ", top_k, ", allowed is 0 to 2**31 - 1");
  }
  sampling_ = {static_cast<float>(temperature), static_cast<int32_t>(top_k), static_cast<float>(top_p),
               static_cast<float>(min_p), seed};
}

}  // namespace fastattn
