#include "sampling/adjust_logits.h"
#include "sampling/apply_token_bitmask.h"
#include "sampling/sample.h"
#include "sampling/speculative_sample.h"
#include "sampling/token_logprobs.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

void adjust_logits_op(const Tensor& logits, const Tensor& token_ids, const Tensor& counts, const Tensor& bias,
                      const Tensor& indptr, const Tensor& repetition_penalty, const Tensor& presence_penalty,
                      const Tensor& frequency_penalty) {
  const Checks checks("adjust_logits", "logits", logits);
  checks.shape("logits", logits, {kAny, kAny}).dtype("logits", logits, {ScalarType::Float});
  const int64_t num_rows = logits.size(0);
  checks.shape("token_ids", token_ids, {kAny}).dtype("token_ids", token_ids, {ScalarType::Int});
  checks.shape("counts", counts, {token_ids.size(0)}).dtype("counts", counts, {ScalarType::Int});
  checks.shape("bias", bias, {token_ids.size(0)}).dtype("bias", bias, {ScalarType::Float});
  checks.shape("indptr", indptr, {num_rows + 1}).dtype("indptr", indptr, {ScalarType::Int});
  const auto column = [&](const char* name, const Tensor& t) {
    checks.shape(name, t, {num_rows}).dtype(name, t, {ScalarType::Float});
    return data<float>(t);
  };
  AdjustLogitsParams p;
  p.repetition_penalty = column("repetition_penalty", repetition_penalty);
  p.presence_penalty = column("presence_penalty", presence_penalty);
  p.frequency_penalty = column("frequency_penalty", frequency_penalty);
  if (logits.numel() == 0 || token_ids.size(0) == 0) return;

  const OnDeviceOf guard(logits);
  p.logits = static_cast<float*>(logits.data_ptr());
  p.token_ids = data<int32_t>(token_ids);
  p.counts = data<int32_t>(counts);
  p.bias = data<float>(bias);
  p.indptr = data<int32_t>(indptr);
  p.logits_stride = logits.stride(0);
  p.num_rows = num_rows;
  p.vocab_size = logits.size(1);
  p.nnz = token_ids.size(0);
  check_launch("adjust_logits", adjust_logits(p, stream_of(logits)));
}

void apply_token_bitmask_op(const Tensor& logits, const Tensor& bitmask, const Tensor& rows) {
  const Checks checks("apply_token_bitmask", "logits", logits);
  checks.shape("logits", logits, {kAny, kAny}).dtype("logits", logits, {ScalarType::Float});
  const int64_t num_masks = rows.size(0);
  checks.shape("rows", rows, {num_masks}).dtype("rows", rows, {ScalarType::Int});
  checks.shape("bitmask", bitmask, {num_masks, (logits.size(1) + 31) / 32})
      .dtype("bitmask", bitmask, {ScalarType::Int});
  if (logits.numel() == 0 || num_masks == 0) return;

  const OnDeviceOf guard(logits);
  ApplyTokenBitmaskParams p;
  p.logits = static_cast<float*>(logits.data_ptr());
  p.bitmask = data<int32_t>(bitmask);
  p.rows = data<int32_t>(rows);
  p.logits_stride = logits.stride(0);
  p.bitmask_stride = bitmask.stride(0);
  p.num_rows = logits.size(0);
  p.num_masks = num_masks;
  p.vocab_size = logits.size(1);
  check_launch("apply_token_bitmask", apply_token_bitmask(p, stream_of(logits)));
}

// Checks what both samplers take and fills all of SampleParams but the result.
SampleParams sample_params(const Checks& checks, const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                           const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position) {
  checks.shape("logits", logits, {kAny, kAny}).dtype("logits", logits, kFloats);
  const int64_t num_rows = logits.size(0);
  const int64_t vocab_size = logits.size(1);
  checks.that(vocab_size > 0 && vocab_size <= kSampleMaxVocab,
              "logits has V = " + std::to_string(vocab_size) + ", expected 1 to " + std::to_string(kSampleMaxVocab));
  const auto column = [&](const char* name, const Tensor& t, ScalarType dtype) {
    checks.shape(name, t, {num_rows}).dtype(name, t, {dtype});
    return t.data_ptr();
  };
  SampleParams p;
  p.temperature = static_cast<const float*>(column("temperature", temperature, ScalarType::Float));
  p.top_k = static_cast<const int32_t*>(column("top_k", top_k, ScalarType::Int));
  p.top_p = static_cast<const float*>(column("top_p", top_p, ScalarType::Float));
  p.min_p = static_cast<const float*>(column("min_p", min_p, ScalarType::Float));
  p.seed = static_cast<const int64_t*>(column("seed", seed, ScalarType::Long));
  p.position = static_cast<const int64_t*>(column("position", position, ScalarType::Long));
  p.logits = logits.data_ptr();
  p.logits_stride = logits.stride(0);
  p.num_rows = num_rows;
  p.vocab_size = static_cast<int32_t>(vocab_size);
  p.dtype = dtype_of(logits);
  return p;
}

Tensor sample_op(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                 const Tensor& min_p, const Tensor& seed, const Tensor& position) {
  const Checks checks("sample", "logits", logits);
  SampleParams p = sample_params(checks, logits, temperature, top_k, top_p, min_p, seed, position);
  Tensor out = empty(logits, {p.num_rows}, ScalarType::Int);
  if (p.num_rows == 0) return out;

  const OnDeviceOf guard(logits);
  p.out = static_cast<int32_t*>(out.data_ptr());
  if (capability_of(logits) >= 90) p.num_sms = static_cast<int32_t>(num_sms_of(logits));
  check_launch("sample", sample(p, stream_of(logits)));
  return out;
}

Tensor speculative_sample_op(const Tensor& logits, const Tensor& draft_logits, const Tensor& draft_token_ids,
                             const Tensor& draft_rows, const Tensor& temperature, const Tensor& top_k,
                             const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position) {
  const Checks checks("speculative_sample", "logits", logits);
  SpeculativeSampleParams p;
  p.target = sample_params(checks, logits, temperature, top_k, top_p, min_p, seed, position);
  checks.shape("draft_logits", draft_logits, {kAny, logits.size(1)})
      .dtype("draft_logits", draft_logits, {logits.scalar_type()});
  const int64_t num_rows = p.target.num_rows;
  checks.shape("draft_token_ids", draft_token_ids, {num_rows})
      .dtype("draft_token_ids", draft_token_ids, {ScalarType::Int});
  checks.shape("draft_rows", draft_rows, {num_rows}).dtype("draft_rows", draft_rows, {ScalarType::Int});
  Tensor out = empty(logits, {num_rows}, ScalarType::Int);
  if (num_rows == 0) return out;

  const OnDeviceOf guard(logits);
  p.target.out = static_cast<int32_t*>(out.data_ptr());
  p.draft_logits = draft_logits.data_ptr();
  p.draft_token_ids = data<int32_t>(draft_token_ids);
  p.draft_rows = data<int32_t>(draft_rows);
  p.draft_stride = draft_logits.stride(0);
  p.num_draft_rows = draft_logits.size(0);
  check_launch("speculative_sample", speculative_sample(p, stream_of(logits)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_op(const Tensor& logits, const Tensor& token_ids,
                                                             int64_t num_top) {
  const Checks checks("token_logprobs", "logits", logits);
  checks.shape("logits", logits, {kAny, kAny}).dtype("logits", logits, kFloats);
  const int64_t num_rows = logits.size(0);
  const int64_t vocab_size = logits.size(1);
  checks.shape("token_ids", token_ids, {num_rows}).dtype("token_ids", token_ids, {ScalarType::Int});
  checks.that(num_top >= 0 && num_top <= vocab_size && vocab_size <= INT32_MAX,
              "num_top is " + std::to_string(num_top) + ", expected 0 to V = " + std::to_string(vocab_size));
  Tensor chosen = empty(logits, {num_rows}, ScalarType::Float);
  Tensor rank = empty(logits, {num_rows}, ScalarType::Int);
  Tensor top = empty(logits, {num_rows, num_top}, ScalarType::Float);
  Tensor top_ids = empty(logits, {num_rows, num_top}, ScalarType::Int);
  if (logits.numel() > 0) {
    const OnDeviceOf guard(logits);
    TokenLogprobsParams p;
    p.logits = logits.data_ptr();
    p.token_ids = data<int32_t>(token_ids);
    p.chosen = static_cast<float*>(chosen.data_ptr());
    p.rank = static_cast<int32_t*>(rank.data_ptr());
    p.top = static_cast<float*>(top.data_ptr());
    p.top_ids = static_cast<int32_t*>(top_ids.data_ptr());
    p.logits_stride = logits.stride(0);
    p.num_rows = num_rows;
    p.vocab_size = static_cast<int32_t>(vocab_size);
    p.num_top = static_cast<int32_t>(num_top);
    p.dtype = dtype_of(logits);
    check_launch("token_logprobs", token_logprobs(p, stream_of(logits)));
  }
  return {chosen, rank, top, top_ids};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("adjust_logits", TORCH_BOX(&adjust_logits_op));
  m.impl("apply_token_bitmask", TORCH_BOX(&apply_token_bitmask_op));
  m.impl("sample", TORCH_BOX(&sample_op));
  m.impl("speculative_sample", TORCH_BOX(&speculative_sample_op));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs_op));
}

}  // namespace fastattn
