#include <algorithm>

#include "attention/flash_bwd_sm80.h"
#include "attention/flash_bwd_sm90.h"
#include "torch/attention_call.h"

namespace fastattn {
namespace {

MaybeTensor with_contiguous_rows(const MaybeTensor& t) {
  if (!t) return t;
  const int64_t last = t->dim() - 1;
  return last < 0 || t->size(last) <= 1 || t->stride(last) == 1 ? *t : packed_copy(*t);
}

int64_t shared_memory_of(const Tensor& t) {
  int bytes = 0;
  check_launch("fastattn",
               cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, t.get_device_index()));
  return bytes;
}

// Dimensions of q and its like: (B, S, H, D), or (T, H, D) packed.
struct Dims {
  int64_t token, head, last;
  explicit Dims(const Tensor& q) : token(q.dim() - 3), head(q.dim() - 2), last(q.dim() - 1) {}
  bool packed() const { return token == 0; }
};

FlashBwdSm80Params::Input input(const Tensor& t) {
  const Dims dims(t);
  return {t.data_ptr(), dims.packed() ? 0 : t.stride(0), t.stride(dims.token), t.stride(dims.head)};
}

FlashBwdSm80Params::Output output(const Tensor& t) {
  const Dims dims(t);
  return {t.data_ptr(), dims.packed() ? 0 : t.stride(0), t.stride(dims.token), t.stride(dims.head)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// What a call has besides: the forward's results, and what arrives at them.
struct Upstream {
  Tensor out, lse, dout;
  MaybeTensor dlse;
  bool deterministic;
};

Gradients empty_gradients(const AttentionCall& call) {
  const auto like = [](const Tensor& t) { return empty(t, shape_of(t), t.scalar_type()); };
  return {like(call.q), like(call.k), like(call.v)};
}

Gradients run_sm80(const char* op, const AttentionCall& call, const Upstream& up) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const Dims dims(q);
  const Gradients gradients = empty_gradients(call);
  const auto& [dq, dk, dv] = gradients;

  FlashBwdSm80Params p;
  fill_params(p, call);
  p.q = input(q);
  p.k = input(k);
  p.v = input(v);
  p.out = input(up.out);
  p.dout = input(up.dout);
  p.dq = output(dq);
  p.dk = output(dk);
  p.dv = output(dv);
  p.lse = data<float>(up.lse);
  p.lse_head_stride = up.lse.stride(dims.packed() ? 0 : 1);
  p.lse_batch_stride = dims.packed() ? 0 : up.lse.stride(0);
  if (up.dlse) {
    p.dlse = data<float>(*up.dlse);
    p.dlse_head_stride = up.dlse->stride(dims.packed() ? 0 : 1);
    p.dlse_batch_stride = dims.packed() ? 0 : up.dlse->stride(0);
  }
  p.q_tokens = q.size(dims.token);
  p.k_tokens = k.size(dims.token);
  p.config = flash_bwd_sm80_config({call.num_seqs, p.num_heads, p.num_kv_heads, std::max(p.head_dim, p.v_head_dim),
                                    p.q_tokens, call.max_seqlen_q, call.max_seqlen_k, dims.packed(), up.deterministic,
                                    shared_memory_of(q), num_sms_of(q)});
  const Tensor lse_base2 = empty(q, {p.num_heads, p.config.padded_tokens}, ScalarType::Float);
  const Tensor delta = empty(q, {p.num_heads, p.config.padded_tokens}, ScalarType::Float);
  const Tensor dq_accum = empty(q, {p.config.dq_accum_size}, ScalarType::Float);
  p.lse_base2 = static_cast<float*>(lse_base2.data_ptr());
  p.delta = static_cast<float*>(delta.data_ptr());
  if (!up.deterministic) p.dq_accum = static_cast<float*>(dq_accum.data_ptr());
  MaybeTensor dk_partial, dv_partial;
  if (p.config.num_splits > 1) {
    const int64_t num_rows = p.config.num_splits * (dims.packed() ? 1 : call.num_seqs) * p.k_tokens * p.num_kv_heads;
    dk_partial = empty(q, {num_rows, p.config.head_dim}, ScalarType::Float);
    dv_partial = empty(q, {num_rows, p.config.head_dim}, ScalarType::Float);
    p.dk_partial = static_cast<float*>(dk_partial->data_ptr());
    p.dv_partial = static_cast<float*>(dv_partial->data_ptr());
  }
  check_launch(op, flash_bwd_sm80(p, stream_of(q)));
  return gradients;
}

Tensor without_strides(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    if (t.size(i) > 1 && t.stride(i) != expected) return packed_copy(t);
    expected *= t.size(i);
  }
  return t;
}

FlashBwdSm90Problem sm90_problem(const AttentionCall& call) {
  const Dims dims(call.q);
  return {call.num_seqs,
          call.num_heads(),
          call.num_kv_heads(),
          std::max(call.head_dim(), call.v_head_dim()),
          call.q.size(dims.token),
          call.max_seqlen_q,
          call.max_seqlen_k,
          dims.packed(),
          call.causal || call.window_right == 0,
          num_sms_of(call.q)};
}

// Whether a call goes to the Hopper kernel, which needs some of q and k.
bool for_sm90(const AttentionCall& call) {
  const bool any = call.q.numel() > 0 && call.k.numel() > 0 && call.max_seqlen_q > 0 && call.max_seqlen_k > 0;
  if (!any || call.kernel != 0) return any && call.kernel == 90;
  return possible_on_sm90(call) && flash_bwd_sm90_is_better(sm90_problem(call));
}

Gradients run_sm90(const char* op, const AttentionCall& call, const Upstream& up) {
  const Tensor dout = with_distinct_rows(up.dout), q = with_distinct_rows(call.q);
  const Tensor k = with_distinct_rows(call.k), v = with_distinct_rows(call.v);
  const Tensor& out = up.out;
  const Tensor lse = without_strides(up.lse);
  MaybeTensor dlse;
  if (up.dlse) dlse = without_strides(*up.dlse);
  const Dims dims(q);
  const auto batch_stride = [&](const Tensor& t) { return dims.packed() ? 0 : t.stride(0); };
  const Gradients gradients = empty_gradients(call);
  const auto& [dq, dk, dv] = gradients;

  FlashBwdSm90Params p;
  fill_params(p, call);
  p.dout = dout.data_ptr();
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = out.data_ptr();
  p.lse = data<float>(lse);
  p.dlse = dlse ? data<float>(*dlse) : nullptr;
  p.dq = dq.data_ptr();
  p.dk = dk.data_ptr();
  p.dv = dv.data_ptr();
  p.dout_batch_stride = batch_stride(dout);
  p.dout_token_stride = dout.stride(dims.token);
  p.dout_head_stride = dout.stride(dims.head);
  p.q_batch_stride = batch_stride(q);
  p.q_token_stride = q.stride(dims.token);
  p.q_head_stride = q.stride(dims.head);
  p.k_batch_stride = batch_stride(k);
  p.k_token_stride = k.stride(dims.token);
  p.k_head_stride = k.stride(dims.head);
  p.v_batch_stride = batch_stride(v);
  p.v_token_stride = v.stride(dims.token);
  p.v_head_stride = v.stride(dims.head);
  p.out_batch_stride = batch_stride(out);
  p.out_token_stride = out.stride(dims.token);
  p.out_head_stride = out.stride(dims.head);
  p.q_tokens = q.size(dims.token);
  p.k_tokens = k.size(dims.token);
  p.config = flash_bwd_sm90_config(sm90_problem(call));
  const int64_t num_rows = p.config.rows(p.num_heads);
  const Tensor lse_log2 = empty(q, {num_rows}, ScalarType::Float);
  const Tensor delta = empty(q, {num_rows}, ScalarType::Float);
  const Tensor dq_sum = empty(q, {num_rows * p.config.head_dim}, ScalarType::Float);
  const Tensor tile_counter = empty(q, {1}, ScalarType::Int);
  p.lse_log2 = static_cast<float*>(lse_log2.data_ptr());
  p.delta = static_cast<float*>(delta.data_ptr());
  p.dq_sum = static_cast<float*>(dq_sum.data_ptr());
  p.tile_counter = static_cast<int32_t*>(tile_counter.data_ptr());
  MaybeTensor turns;
  if (up.deterministic) {
    turns = empty(q, {2 * p.num_heads * p.config.blocks_of_head}, ScalarType::Int);
    p.turns = static_cast<int32_t*>(turns->data_ptr());
  }
  check_launch(op, flash_bwd_sm90(p, stream_of(q)));
  return gradients;
}

// Checks that do not depend on the layout, and which kernel.
Gradients run(const char* op, const Checks& checks, const AttentionCall& call, const Upstream& up) {
  check_call(checks, call);
  const Tensor& q = call.q;
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>("k", call.k), {"v", call.v}, {"out", up.out}, {"dout", up.dout}}) {
    checks.dtype(name, t, {q.scalar_type()});
  }
  checks.dtype("lse", up.lse, {ScalarType::Float});
  if (up.dlse) checks.dtype("dlse", *up.dlse, {ScalarType::Float});
  if (q.numel() == 0 && call.k.numel() == 0) return empty_gradients(call);
  if (for_sm90(call)) return run_sm90(op, call, up);
  checks.that(shared_memory_of(q) >= kFlashBwdSm80SharedMemory, "this GPU gives a thread block " +
                                                                    std::to_string(shared_memory_of(q)) +
                                                                    " bytes of shared memory, expected 160 KiB");
  return run_sm80(op, call, up);
}

Gradients batch_attention_backward_op(const Tensor& dout_given, const Tensor& q_given, const Tensor& k_given,
                                      const Tensor& v_given, const Tensor& out_given, const Tensor& lse,
                                      const MaybeTensor& dlse_given, const MaybeTensor& alibi_slopes,
                                      double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                                      double softcap, bool deterministic, int64_t kernel) {
  const char* const op = "batch_attention_backward";
  const Checks checks(op, "q", q_given);
  const OnDeviceOf guard(q_given);
  checks.shape("q", q_given, {kAny, kAny, kAny, kAny}).dtype("q", q_given, kHalves);
  const Tensor q = with_aligned_rows(q_given), k = with_aligned_rows(k_given), v = with_aligned_rows(v_given);
  const Tensor out = with_aligned_rows(out_given), dout = with_aligned_rows(dout_given);
  const MaybeTensor dlse = with_contiguous_rows(dlse_given);
  const int64_t num_seqs = q.size(0), q_len = q.size(1), num_heads = q.size(2);
  checks.shape("k", k, {num_seqs, kAny, kAny, q.size(3)});
  const int64_t k_len = k.size(1);
  checks.shape("v", v, {num_seqs, k_len, k.size(2), kAny});
  checks.shape("out", out, {num_seqs, q_len, num_heads, v.size(3)});
  checks.shape("dout", dout, {num_seqs, q_len, num_heads, v.size(3)});
  checks.shape("lse", lse, {num_seqs, num_heads, q_len});
  if (dlse) checks.shape("dlse", *dlse, {num_seqs, num_heads, q_len});
  const AttentionCall call = {.q = q,
                              .k = k,
                              .v = v,
                              .alibi_slopes = alibi_slopes,
                              .num_seqs = num_seqs,
                              .max_seqlen_q = q_len,
                              .max_seqlen_k = k_len,
                              .softmax_scale = softmax_scale,
                              .causal = causal,
                              .window_left = window_left,
                              .window_right = window_right,
                              .softcap = softcap,
                              .kernel = kernel};
  return run(op, checks, call, {out, lse, dout, dlse, deterministic});
}

Gradients varlen_attention_backward_op(const Tensor& dout_given, const Tensor& q_given, const Tensor& k_given,
                                       const Tensor& v_given, const Tensor& out_given, const Tensor& lse,
                                       const MaybeTensor& dlse_given, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, const MaybeTensor& seqused_q,
                                       const MaybeTensor& seqused_k, const MaybeTensor& alibi_slopes,
                                       int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
                                       int64_t window_left, int64_t window_right, double softcap, bool deterministic,
                                       int64_t kernel) {
  const char* const op = "varlen_attention_backward";
  const Checks checks(op, "q", q_given);
  const OnDeviceOf guard(q_given);
  checks.shape("q", q_given, {kAny, kAny, kAny}).dtype("q", q_given, kHalves);
  const Tensor q = with_aligned_rows(q_given), k = with_aligned_rows(k_given), v = with_aligned_rows(v_given);
  const Tensor out = with_aligned_rows(out_given), dout = with_aligned_rows(dout_given);
  const MaybeTensor dlse = with_contiguous_rows(dlse_given);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1);
  checks.shape("k", k, {kAny, kAny, q.size(2)});
  checks.shape("v", v, {k.size(0), k.size(1), kAny});
  checks.shape("out", out, {num_tokens, num_heads, v.size(2)});
  checks.shape("dout", dout, {num_tokens, num_heads, v.size(2)});
  checks.shape("lse", lse, {num_heads, num_tokens});
  if (dlse) checks.shape("dlse", *dlse, {num_heads, num_tokens});
  checks.shape("cu_seqlens_q", cu_seqlens_q, {kAny}).dtype("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int});
  checks.that(cu_seqlens_q.size(0) > 0, "cu_seqlens_q is empty, expected B + 1 elements");
  checks.shape("cu_seqlens_k", cu_seqlens_k, {cu_seqlens_q.size(0)})
      .dtype("cu_seqlens_k", cu_seqlens_k, {ScalarType::Int});
  const AttentionCall call = {.q = q,
                              .k = k,
                              .v = v,
                              .cu_seqlens_q = cu_seqlens_q,
                              .cu_seqlens_k = cu_seqlens_k,
                              .seqused_q = seqused_q,
                              .seqused_k = seqused_k,
                              .alibi_slopes = alibi_slopes,
                              .num_seqs = cu_seqlens_q.size(0) - 1,
                              .max_seqlen_q = max_seqlen_q,
                              .max_seqlen_k = max_seqlen_k,
                              .softmax_scale = softmax_scale,
                              .causal = causal,
                              .window_left = window_left,
                              .window_right = window_right,
                              .softcap = softcap,
                              .kernel = kernel};
  return run(op, checks, call, {out, lse, dout, dlse, deterministic});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("batch_attention_backward", TORCH_BOX(&batch_attention_backward_op));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward_op));
}

}  // namespace fastattn
