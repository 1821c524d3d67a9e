#include "torch/attention_call.h"

#include <algorithm>

namespace fastattn {
namespace {

void check_head_dim(const Checks& checks, const char* name, const Tensor& t) {
  const int64_t head_dim = t.size(t.dim() - 1), multiple = is_8bit(t) ? 16 : 8;
  checks.that(head_dim > 0 && head_dim % multiple == 0 && head_dim <= 256,
              std::string(name) + " has head dim " + std::to_string(head_dim) + ", expected a multiple of " +
                  std::to_string(multiple) + " up to 256");
}

}  // namespace

bool rows_aligned(const Tensor& t) {
  const int64_t last = t.dim() - 1, elements = is_8bit(t) ? 16 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (t.size(last) <= 1 || t.stride(last) == 1);
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % elements == 0);
  return aligned;
}

Tensor with_aligned_rows(const Tensor& t) { return rows_aligned(t) ? t : packed_copy(t); }

bool rows_distinct(const Tensor& t) {
  bool distinct = rows_aligned(t);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) distinct = distinct && (t.size(i) <= 1 || t.stride(i) > 0);
  return distinct;
}

Tensor with_distinct_rows(const Tensor& t) { return rows_distinct(t) ? t : packed_copy(t); }

bool possible_on_sm90(const AttentionCall& call) { return capability_of(call.q) == 90 && call.softmax_scale > 0.0; }

int32_t clamped_window(int64_t size) { return static_cast<int32_t>(std::clamp<int64_t>(size, -1, kMaxWindow)); }

void check_call(const Checks& checks, const AttentionCall& call) {
  check_head_dim(checks, "q", call.q);
  check_head_dim(checks, "v", call.v);
  const int64_t num_heads = call.num_heads(), num_kv_heads = call.num_kv_heads();
  checks.that(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "q has " + std::to_string(num_heads) +
                                                                     " heads, expected a multiple of " +
                                                                     std::to_string(num_kv_heads) + " KV heads");
  checks.that(call.num_seqs > 0 || call.q.numel() == 0,
              "cu_seqlens_q has no sequence, expected one that q's tokens are of");
  if (call.alibi_slopes) {
    checks.dtype("alibi_slopes", *call.alibi_slopes, {ScalarType::Float});
    if (call.alibi_slopes->dim() == 1) checks.shape("alibi_slopes", *call.alibi_slopes, {num_heads});
    if (call.alibi_slopes->dim() != 1) checks.shape("alibi_slopes", *call.alibi_slopes, {call.num_seqs, num_heads});
  }
  if (call.sinks) checks.shape("sinks", *call.sinks, {num_heads}).dtype("sinks", *call.sinks, {ScalarType::Float});
  const auto per_sequence = [&](const char* name, const MaybeTensor& t) {
    if (t) checks.shape(name, *t, {call.num_seqs}).dtype(name, *t, {ScalarType::Int});
  };
  per_sequence("seqused_q", call.seqused_q);
  per_sequence("seqused_k", call.seqused_k);
  const auto descale = [&](const char* name, const MaybeTensor& t) {
    if (!t) return;
    checks.dtype(name, *t, {ScalarType::Float});
    checks.that(is_fp8(call.q), std::string(name) + " is given, expected it with float8_e4m3fn inputs only");
    checks.that(t->is_cuda() && shape_of(*t) == std::vector<int64_t>{call.num_seqs, num_kv_heads},
                std::string(name) + " has another shape or device, expected (" + std::to_string(call.num_seqs) + ", " +
                    std::to_string(num_kv_heads) + ") on q's device");
  };
  descale("q_descale", call.q_descale);
  descale("k_descale", call.k_descale);
  descale("v_descale", call.v_descale);
  checks.that(call.kernel != 90 || possible_on_sm90(call),
              "kernel is sm90, expected sm80 for a GPU of capability " + std::to_string(capability_of(call.q)) +
                  " and softmax_scale " + std::to_string(call.softmax_scale));
}

}  // namespace fastattn
