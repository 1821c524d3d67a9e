#include <algorithm>

#include "attention/flash_fwd_sm90.h"
#include "attention/flash_sm80.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

// Every row of 16-bit elements begins at a multiple of 16 bytes, which is what cp.async copies.
bool rows_aligned(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % 8 == 0);
  return aligned;
}

Tensor with_aligned_rows(const Tensor& t) { return rows_aligned(t) ? t : packed_copy(t); }

// What the copy engine can be told of: rows as above, and no dimension that repeats the same ones (an expanded tensor).
Tensor with_distinct_rows(const Tensor& t) {
  bool distinct = rows_aligned(t);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) distinct = distinct && (t.size(i) <= 1 || t.stride(i) > 0);
  return distinct ? t : packed_copy(t);
}

int32_t window(int64_t size) { return static_cast<int32_t>(std::clamp<int64_t>(size, -1, kMaxWindow)); }

void check_heads(const Checks& checks, const Tensor& q, int64_t num_kv_heads) {
  const int64_t num_heads = q.size(q.dim() - 2), head_dim = q.size(q.dim() - 1);
  checks.that(head_dim > 0 && head_dim % 8 == 0 && head_dim <= 256,
              "q has head dim " + std::to_string(head_dim) + ", expected a multiple of 8 up to 256");
  checks.that(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "q has " + std::to_string(num_heads) +
                                                                     " heads, expected a multiple of " +
                                                                     std::to_string(num_kv_heads) + " KV heads");
}

void check_kernel(const Checks& checks, const Tensor& q, int64_t kernel, double softmax_scale) {
  checks.that(kernel != 90 || (capability_of(q) == 90 && softmax_scale > 0.0),
              "kernel is sm90, expected sm80 for a GPU of capability " + std::to_string(capability_of(q)) +
                  " and softmax_scale " + std::to_string(softmax_scale));
}

// Whether a call goes to the Hopper kernel if it does not say: that one takes 64 rows of one head at a time, so that
// the portable one, which packs the heads of a group into one tile, is better where there are few.
bool for_sm90(const Tensor& q, int64_t kernel, const FlashSm80Problem& problem, double softmax_scale) {
  if (kernel != 0) return kernel == 90;
  return capability_of(q) == 90 && softmax_scale > 0.0 && !flash_sm80_config(problem).decode;
}

// What both have in common: everything about q, the mask, the results, and the launch.
std::tuple<Tensor, Tensor> run(const char* op, FlashSm80Params p, const Tensor& q_given, int64_t num_seqs,
                               int64_t num_kv_heads, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                               bool causal, int64_t window_left, int64_t window_right, double softcap) {
  Tensor out = empty(q_given, shape_of(q_given), q_given.scalar_type());
  Tensor lse = empty(q_given, {q_given.size(1), q_given.size(0)}, ScalarType::Float);
  if (q_given.numel() == 0) return {out, lse};

  const Tensor q = with_aligned_rows(q_given);
  p.q = q.data_ptr();
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.num_tokens = q.size(0);
  p.num_seqs = static_cast<int32_t>(num_seqs);
  p.num_heads = static_cast<int32_t>(q.size(1));
  p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = window(window_left);
  p.window_right = causal ? 0 : window(window_right);
  p.dtype = dtype_of(q);
  p.config =
      flash_sm80_config({p.num_seqs, p.num_heads, num_kv_heads, p.head_dim, max_seqlen_q, max_seqlen_k, num_sms_of(q)});
  std::optional<Tensor> partial_out, partial_lse;
  if (p.config.num_splits > 1) {
    partial_out = empty(q, {p.config.num_splits, q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    partial_lse = empty(q, {p.config.num_splits, q.size(1), q.size(0)}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial_out->data_ptr());
    p.partial_lse = static_cast<float*>(partial_lse->data_ptr());
  }
  check_launch(op, flash_sm80_forward(p, stream_of(q)));
  return {out, lse};
}

// On the Hopper kernel: q (B, Sq, H, D), or packed (T, H, D) with offsets; rows are aligned, and there are some of q
// and k.
std::tuple<Tensor, Tensor> run_sm90(const char* op, const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
                                    const std::optional<Tensor>& cu_seqlens_q,
                                    const std::optional<Tensor>& cu_seqlens_k, int64_t max_seqlen_q,
                                    int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
                                    int64_t window_right, double softcap) {
  const Tensor q = with_distinct_rows(q_given), k = with_distinct_rows(k_given), v = with_distinct_rows(v_given);
  const int64_t batch = q.dim() - 4;  // where the batch dimension is; -1 if packed
  const int64_t token = batch + 1, head = batch + 2;
  Tensor out = empty(q, shape_of(q), q.scalar_type());
  Tensor lse = batch < 0 ? empty(q, {q.size(head), q.size(token)}, ScalarType::Float)
                         : empty(q, {q.size(0), q.size(head), q.size(token)}, ScalarType::Float);
  Tensor tile_counter = empty(q, {1}, ScalarType::Int);
  FlashFwdSm90Params p;
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.tile_counter = static_cast<int32_t*>(tile_counter.data_ptr());
  if (batch < 0) {
    p.cu_seqlens_q = data<int32_t>(*cu_seqlens_q);
    p.cu_seqlens_k = data<int32_t>(*cu_seqlens_k);
    p.num_seqs = static_cast<int32_t>(cu_seqlens_q->size(0) - 1);
  } else {
    p.q_batch_stride = q.stride(0);
    p.k_batch_stride = k.stride(0);
    p.v_batch_stride = v.stride(0);
    p.out_batch_stride = out.stride(0);
    p.lse_batch_stride = lse.stride(0);
    p.num_seqs = static_cast<int32_t>(q.size(0));
  }
  p.q_token_stride = q.stride(token);
  p.q_head_stride = q.stride(head);
  p.k_token_stride = k.stride(token);
  p.k_head_stride = k.stride(head);
  p.v_token_stride = v.stride(token);
  p.v_head_stride = v.stride(head);
  p.out_token_stride = out.stride(token);
  p.out_head_stride = out.stride(head);
  p.lse_head_stride = lse.stride(batch + 1);
  p.q_tokens = q.size(token);
  p.k_tokens = k.size(token);
  p.num_tokens = batch < 0 ? p.q_tokens : p.num_seqs * p.q_tokens;
  p.num_heads = static_cast<int32_t>(q.size(head));
  p.num_kv_heads = static_cast<int32_t>(k.size(head));
  p.head_dim = static_cast<int32_t>(q.size(q.dim() - 1));
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.softcap = static_cast<float>(softcap);
  p.window_left = window(window_left);
  p.window_right = causal ? 0 : window(window_right);
  p.dtype = dtype_of(q);
  p.config = flash_fwd_sm90_config({p.num_seqs, p.num_heads, p.num_kv_heads, p.head_dim, max_seqlen_q, max_seqlen_k,
                                    p.window_right == 0, num_sms_of(q)});
  std::optional<Tensor> partial_out, partial_lse;
  if (p.config.num_splits > 1) {
    partial_out = empty(q, {p.config.num_splits, p.num_tokens, p.num_heads, p.head_dim}, ScalarType::Float);
    partial_lse = empty(q, {p.config.num_splits, p.num_heads, p.num_tokens}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial_out->data_ptr());
    p.partial_lse = static_cast<float*>(partial_lse->data_ptr());
  }
  check_launch(op, flash_fwd_sm90(p, stream_of(q)));
  return {out, lse};
}

std::tuple<Tensor, Tensor> paged_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& cu_seqlens_q, const Tensor& seqused_k,
                                              const Tensor& block_table, int64_t max_seqlen_q, double softmax_scale,
                                              bool causal, int64_t window_left, int64_t window_right, double softcap) {
  const char* const op = "paged_attention";
  const Checks checks(op, "q", q);
  checks.shape("q", q, {kAny, kAny, kAny}).dtype("q", q, kHalves);
  checks.shape("k_cache", k_cache, {kAny, kAny, kAny, q.size(2)}).dtype("k_cache", k_cache, {q.scalar_type()});
  const int64_t num_kv_heads = k_cache.size(2);
  checks.shape("v_cache", v_cache, {k_cache.size(0), k_cache.size(1), num_kv_heads, q.size(2)})
      .dtype("v_cache", v_cache, {q.scalar_type()});
  check_heads(checks, q, num_kv_heads);
  checks.shape("seqused_k", seqused_k, {kAny}).dtype("seqused_k", seqused_k, {ScalarType::Int});
  const int64_t num_seqs = seqused_k.size(0);
  checks.shape("cu_seqlens_q", cu_seqlens_q, {num_seqs + 1}).dtype("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int});
  checks.shape("block_table", block_table, {num_seqs, kAny}).dtype("block_table", block_table, {ScalarType::Int});
  // A copy of the cache at every call would hide a slowness of orders of magnitude.
  checks.that(rows_aligned(k_cache) && rows_aligned(v_cache),
              "k_cache and v_cache have rows that are not 16-byte aligned, expected strides that are multiples of 8");

  const OnDeviceOf guard(q);
  FlashSm80Params p;
  p.paged = true;
  p.k = k_cache.data_ptr();
  p.v = v_cache.data_ptr();
  p.seqused_k = data<int32_t>(seqused_k);
  p.block_table = data<int32_t>(block_table);
  p.k_block_stride = k_cache.stride(0);
  p.k_token_stride = k_cache.stride(1);
  p.k_head_stride = k_cache.stride(2);
  p.v_block_stride = v_cache.stride(0);
  p.v_token_stride = v_cache.stride(1);
  p.v_head_stride = v_cache.stride(2);
  p.block_table_stride = block_table.stride(0);
  p.num_blocks = static_cast<int32_t>(k_cache.size(0));
  p.max_blocks = static_cast<int32_t>(block_table.size(1));
  p.block_size = static_cast<int32_t>(std::max<int64_t>(k_cache.size(1), 1));
  const int64_t capacity = block_table.size(1) * k_cache.size(1);
  p.cu_seqlens_q = data<int32_t>(cu_seqlens_q);
  return run(op, p, q, num_seqs, num_kv_heads, max_seqlen_q, capacity, softmax_scale, causal, window_left, window_right,
             softcap);
}

std::tuple<Tensor, Tensor> varlen_attention_op(const Tensor& q, const Tensor& k_given, const Tensor& v_given,
                                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                               int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                                               bool causal, int64_t window_left, int64_t window_right, double softcap,
                                               int64_t kernel) {
  const char* const op = "varlen_attention";
  const Checks checks(op, "q", q);
  checks.shape("q", q, {kAny, kAny, kAny}).dtype("q", q, kHalves);
  checks.shape("k", k_given, {kAny, kAny, q.size(2)}).dtype("k", k_given, {q.scalar_type()});
  const int64_t num_kv_heads = k_given.size(1);
  checks.shape("v", v_given, {k_given.size(0), num_kv_heads, q.size(2)}).dtype("v", v_given, {q.scalar_type()});
  check_heads(checks, q, num_kv_heads);
  checks.shape("cu_seqlens_q", cu_seqlens_q, {kAny}).dtype("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int});
  checks.that(cu_seqlens_q.size(0) > 0, "cu_seqlens_q is empty, expected B + 1 elements");
  checks.shape("cu_seqlens_k", cu_seqlens_k, {cu_seqlens_q.size(0)})
      .dtype("cu_seqlens_k", cu_seqlens_k, {ScalarType::Int});

  const OnDeviceOf guard(q);
  const Tensor k = with_aligned_rows(k_given);
  const Tensor v = with_aligned_rows(v_given);
  const int64_t num_seqs = cu_seqlens_q.size(0) - 1;
  check_kernel(checks, q, kernel, softmax_scale);
  const FlashSm80Problem problem = {num_seqs,     q.size(1),    num_kv_heads, q.size(2),
                                    max_seqlen_q, max_seqlen_k, num_sms_of(q)};
  if (q.numel() > 0 && k.numel() > 0 && for_sm90(q, kernel, problem, softmax_scale)) {
    return run_sm90(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
                    window_left, window_right, softcap);
  }
  FlashSm80Params p;
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.cu_seqlens_k = data<int32_t>(cu_seqlens_k);
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.cu_seqlens_q = data<int32_t>(cu_seqlens_q);
  return run(op, p, q, num_seqs, num_kv_heads, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left,
             window_right, softcap);
}

std::tuple<Tensor, Tensor> batch_attention_op(const Tensor& q, const Tensor& k_given, const Tensor& v_given,
                                              double softmax_scale, bool causal, int64_t window_left,
                                              int64_t window_right, double softcap, int64_t kernel) {
  const char* const op = "batch_attention";
  const Checks checks(op, "q", q);
  checks.shape("q", q, {kAny, kAny, kAny, kAny}).dtype("q", q, kHalves);
  checks.shape("k", k_given, {q.size(0), kAny, kAny, q.size(3)}).dtype("k", k_given, {q.scalar_type()});
  const int64_t num_kv_heads = k_given.size(2);
  checks.shape("v", v_given, {q.size(0), k_given.size(1), num_kv_heads, q.size(3)})
      .dtype("v", v_given, {q.scalar_type()});
  check_heads(checks, q, num_kv_heads);
  check_kernel(checks, q, kernel, softmax_scale);

  const OnDeviceOf guard(q);
  const int64_t num_seqs = q.size(0), q_len = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const int64_t k_len = k_given.size(1);
  const FlashSm80Problem problem = {num_seqs, num_heads, num_kv_heads, head_dim, q_len, k_len, num_sms_of(q)};
  if (q.numel() > 0 && k_len > 0 && for_sm90(q, kernel, problem, softmax_scale)) {
    return run_sm90(op, q, k_given, v_given, std::nullopt, std::nullopt, q_len, k_len, softmax_scale, causal,
                    window_left, window_right, softcap);
  }
  // The portable kernel takes sequences one behind the other.
  const Tensor packed_q = torch::stable::reshape(q, {num_seqs * q_len, num_heads, head_dim});
  const Tensor k = with_aligned_rows(torch::stable::reshape(k_given, {num_seqs * k_len, num_kv_heads, head_dim}));
  const Tensor v = with_aligned_rows(torch::stable::reshape(v_given, {num_seqs * k_len, num_kv_heads, head_dim}));
  FlashSm80Params p;
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.batch_q_len = static_cast<int32_t>(q_len);
  p.batch_k_len = static_cast<int32_t>(k_len);
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  const auto [out, lse] = run(op, p, packed_q, num_seqs, num_kv_heads, q_len, k_len, softmax_scale, causal, window_left,
                              window_right, softcap);
  return {torch::stable::reshape(out, {num_seqs, q_len, num_heads, head_dim}),
          packed_copy(torch::stable::transpose(torch::stable::reshape(lse, {num_heads, num_seqs, q_len}), 0, 1))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_op));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention_op));
  m.impl("batch_attention", TORCH_BOX(&batch_attention_op));
}

}  // namespace fastattn
