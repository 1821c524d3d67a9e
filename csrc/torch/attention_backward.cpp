#include <algorithm>

#include "attention/flash_bwd_sm80.h"
#include "attention/flash_bwd_sm90.h"
#include "attention/flash_sm80.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

// Rows of 16-bit elements that begin at multiples of 16 bytes, the last dimension contiguous. A gradient that torch
// made is often an expanded scalar, or transposed.
Tensor with_aligned_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (t.size(last) <= 1 || t.stride(last) == 1);
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % 8 == 0);
  return aligned ? t : packed_copy(t);
}

std::optional<Tensor> with_contiguous_rows(const std::optional<Tensor>& t) {
  if (!t) return t;
  const int64_t last = t->dim() - 1;
  return last < 0 || t->size(last) <= 1 || t->stride(last) == 1 ? *t : packed_copy(*t);
}

int32_t window(int64_t size) { return static_cast<int32_t>(std::clamp<int64_t>(size, -1, kMaxWindow)); }

// What the two operators have in common but for tensors.
struct Call {
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  bool deterministic;
  int64_t kernel;
};

struct Lengths {
  std::optional<Tensor> cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
};

std::optional<const int32_t*> ints(const std::optional<Tensor>& t) {
  return t ? std::optional(data<int32_t>(*t)) : std::nullopt;
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

Gradients run_sm80(const char* op, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const std::optional<Tensor>& dlse,
                   const std::optional<Tensor>& alibi_slopes, const Lengths& lengths, int64_t num_seqs,
                   const Call& call) {
  const Dims dims(q);
  Tensor dq = empty(q, shape_of(q), q.scalar_type());
  Tensor dk = empty(k, shape_of(k), k.scalar_type());
  Tensor dv = empty(v, shape_of(v), v.scalar_type());

  FlashBwdSm80Params p;
  p.q = input(q);
  p.k = input(k);
  p.v = input(v);
  p.out = input(out);
  p.dout = input(dout);
  p.dq = output(dq);
  p.dk = output(dk);
  p.dv = output(dv);
  p.lse = data<float>(lse);
  p.lse_head_stride = lse.stride(dims.packed() ? 0 : 1);
  p.lse_batch_stride = dims.packed() ? 0 : lse.stride(0);
  if (dlse) {
    p.dlse = data<float>(*dlse);
    p.dlse_head_stride = dlse->stride(dims.packed() ? 0 : 1);
    p.dlse_batch_stride = dims.packed() ? 0 : dlse->stride(0);
  }
  p.cu_seqlens_q = ints(lengths.cu_seqlens_q).value_or(nullptr);
  p.cu_seqlens_k = ints(lengths.cu_seqlens_k).value_or(nullptr);
  p.seqused_q = ints(lengths.seqused_q).value_or(nullptr);
  p.seqused_k = ints(lengths.seqused_k).value_or(nullptr);
  if (alibi_slopes) {
    p.alibi_slopes = data<float>(*alibi_slopes);
    p.alibi_batch_stride = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  }
  p.q_tokens = q.size(dims.token);
  p.k_tokens = k.size(dims.token);
  p.num_seqs = static_cast<int32_t>(num_seqs);
  p.num_heads = static_cast<int32_t>(q.size(dims.head));
  p.num_kv_heads = static_cast<int32_t>(k.size(dims.head));
  p.head_dim = static_cast<int32_t>(q.size(dims.last));
  p.v_head_dim = static_cast<int32_t>(v.size(dims.last));
  p.softmax_scale = static_cast<float>(call.softmax_scale);
  p.softcap = static_cast<float>(call.softcap);
  p.window_left = window(call.window_left);
  p.window_right = call.causal ? 0 : window(call.window_right);
  p.dtype = dtype_of(q);
  p.config = flash_bwd_sm80_config({num_seqs, p.num_heads, p.num_kv_heads, std::max(p.head_dim, p.v_head_dim),
                                    p.q_tokens, call.max_seqlen_q, call.max_seqlen_k, dims.packed(), call.deterministic,
                                    shared_memory_of(q), num_sms_of(q)});
  const Tensor lse_base2 = empty(q, {p.num_heads, p.config.padded_tokens}, ScalarType::Float);
  const Tensor delta = empty(q, {p.num_heads, p.config.padded_tokens}, ScalarType::Float);
  const Tensor dq_accum = empty(q, {p.config.dq_accum_size}, ScalarType::Float);
  p.lse_base2 = static_cast<float*>(lse_base2.data_ptr());
  p.delta = static_cast<float*>(delta.data_ptr());
  if (!call.deterministic) p.dq_accum = static_cast<float*>(dq_accum.data_ptr());
  std::optional<Tensor> dk_partial, dv_partial;
  if (p.config.num_splits > 1) {
    const int64_t num_rows = p.config.num_splits * (dims.packed() ? 1 : num_seqs) * p.k_tokens * p.num_kv_heads;
    dk_partial = empty(q, {num_rows, p.config.head_dim}, ScalarType::Float);
    dv_partial = empty(q, {num_rows, p.config.head_dim}, ScalarType::Float);
    p.dk_partial = static_cast<float*>(dk_partial->data_ptr());
    p.dv_partial = static_cast<float*>(dv_partial->data_ptr());
  }
  check_launch(op, flash_bwd_sm80(p, stream_of(q)));
  return {dq, dk, dv};
}

// What the copy engine can be told of: aligned rows, and no dimension that repeats the same ones (an expanded tensor).
Tensor with_distinct_rows(const Tensor& t) {
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    if (t.size(i) > 1 && t.stride(i) <= 0) return packed_copy(t);
  }
  return t;
}

Tensor without_strides(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    if (t.size(i) > 1 && t.stride(i) != expected) return packed_copy(t);
    expected *= t.size(i);
  }
  return t;
}

bool fits_sm90(const Tensor& q, const Tensor& v, const Call& call) {
  const Dims dims(q);
  return capability_of(q) == 90 && call.softmax_scale > 0.0 &&
         std::max(q.size(dims.last), v.size(dims.last)) <= kFlashBwdSm90MaxHeadDim;
}

// Whether the portable kernel is the faster one all the same. With turns and a mask to the right Hopper's tiles wait
// for each other most of the time; and it has no way to share out the heads of a group, where key blocks are few.
bool better_on_sm80(const Tensor& q, const Tensor& k, const Tensor& v, int64_t num_seqs, const Call& call) {
  if (call.deterministic && (call.causal || call.window_right >= 0)) return true;
  const Dims dims(q);
  const int64_t num_heads = q.size(dims.head), num_kv_heads = k.size(dims.head);
  const int64_t block_n = flash_bwd_sm90_tile(static_cast<int>(std::max(q.size(dims.last), v.size(dims.last)))).block_n;
  const int64_t num_tiles = num_seqs * num_kv_heads * ((call.max_seqlen_k + block_n - 1) / block_n);
  return num_heads > num_kv_heads && 3 * num_tiles < num_sms_of(q);
}

Gradients run_sm90(const char* op, const Tensor& dout_given, const Tensor& q_given, const Tensor& k_given,
                   const Tensor& v_given, const Tensor& out, const Tensor& lse_given,
                   const std::optional<Tensor>& dlse_given, const std::optional<Tensor>& alibi_slopes,
                   const Lengths& lengths, int64_t num_seqs, const Call& call) {
  const Tensor dout = with_distinct_rows(dout_given), q = with_distinct_rows(q_given);
  const Tensor k = with_distinct_rows(k_given), v = with_distinct_rows(v_given);
  const Tensor lse = without_strides(lse_given);
  const std::optional<Tensor> dlse = dlse_given ? std::optional(without_strides(*dlse_given)) : std::nullopt;
  const Dims dims(q);
  const auto batch_stride = [&](const Tensor& t) { return dims.packed() ? 0 : t.stride(0); };
  Tensor dq = empty(q, shape_of(q), q.scalar_type());
  Tensor dk = empty(k, shape_of(k), k.scalar_type());
  Tensor dv = empty(v, shape_of(v), v.scalar_type());

  FlashBwdSm90Params p;
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
  p.cu_seqlens_q = ints(lengths.cu_seqlens_q).value_or(nullptr);
  p.cu_seqlens_k = ints(lengths.cu_seqlens_k).value_or(nullptr);
  p.seqused_q = ints(lengths.seqused_q).value_or(nullptr);
  p.seqused_k = ints(lengths.seqused_k).value_or(nullptr);
  if (alibi_slopes) {
    p.alibi_slopes = data<float>(*alibi_slopes);
    p.alibi_batch_stride = alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  }
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
  p.num_seqs = static_cast<int32_t>(num_seqs);
  p.num_heads = static_cast<int32_t>(q.size(dims.head));
  p.num_kv_heads = static_cast<int32_t>(k.size(dims.head));
  p.head_dim = static_cast<int32_t>(q.size(dims.last));
  p.v_head_dim = static_cast<int32_t>(v.size(dims.last));
  p.softmax_scale = static_cast<float>(call.softmax_scale);
  p.softcap = static_cast<float>(call.softcap);
  p.window_left = window(call.window_left);
  p.window_right = call.causal ? 0 : window(call.window_right);
  p.dtype = dtype_of(q);
  p.config =
      flash_bwd_sm90_config({num_seqs, p.num_heads, p.num_kv_heads, std::max(p.head_dim, p.v_head_dim), p.q_tokens,
                             call.max_seqlen_q, call.max_seqlen_k, dims.packed(), p.window_right == 0, num_sms_of(q)});
  const int64_t num_rows = p.config.rows(p.num_heads);
  const Tensor lse_log2 = empty(q, {num_rows}, ScalarType::Float);
  const Tensor delta = empty(q, {num_rows}, ScalarType::Float);
  const Tensor dq_sum = empty(q, {num_rows * p.config.head_dim}, ScalarType::Float);
  const Tensor tile_counter = empty(q, {1}, ScalarType::Int);
  p.lse_log2 = static_cast<float*>(lse_log2.data_ptr());
  p.delta = static_cast<float*>(delta.data_ptr());
  p.dq_sum = static_cast<float*>(dq_sum.data_ptr());
  p.tile_counter = static_cast<int32_t*>(tile_counter.data_ptr());
  std::optional<Tensor> turns;
  if (call.deterministic) {
    turns = empty(q, {2 * p.num_heads * p.config.blocks_of_head}, ScalarType::Int);
    p.turns = static_cast<int32_t*>(turns->data_ptr());
  }
  check_launch(op, flash_bwd_sm90(p, stream_of(q)));
  return {dq, dk, dv};
}

// Checks that do not depend on the layout, and which kernel.
Gradients run(const char* op, const Checks& checks, const Tensor& dout, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& dlse,
              const std::optional<Tensor>& alibi_slopes, const Lengths& lengths, int64_t num_seqs, const Call& call) {
  const Dims dims(q);
  const int64_t num_heads = q.size(dims.head), num_kv_heads = k.size(dims.head);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>("q", q), {"v", v}}) {
    const int64_t head_dim = t.size(dims.last);
    checks.that(
        head_dim > 0 && head_dim % 8 == 0 && head_dim <= 256,
        std::string(name) + " has head dim " + std::to_string(head_dim) + ", expected a multiple of 8 up to 256");
  }
  checks.that(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "q has " + std::to_string(num_heads) +
                                                                     " heads, expected a multiple of " +
                                                                     std::to_string(num_kv_heads) + " KV heads");
  for (const auto& [name, t] :
       {std::pair<const char*, const Tensor&>("k", k), {"v", v}, {"out", out}, {"dout", dout}}) {
    checks.dtype(name, t, {q.scalar_type()});
  }
  checks.dtype("lse", lse, {ScalarType::Float});
  if (dlse) checks.dtype("dlse", *dlse, {ScalarType::Float});
  if (alibi_slopes) {
    checks.dtype("alibi_slopes", *alibi_slopes, {ScalarType::Float});
    if (alibi_slopes->dim() == 2) {
      checks.shape("alibi_slopes", *alibi_slopes, {num_seqs, num_heads});
    } else {
      checks.shape("alibi_slopes", *alibi_slopes, {num_heads});
    }
  }
  for (const auto& [name, t] : {std::pair<const char*, const std::optional<Tensor>&>("seqused_q", lengths.seqused_q),
                                {"seqused_k", lengths.seqused_k}}) {
    if (t) checks.shape(name, *t, {num_seqs}).dtype(name, *t, {ScalarType::Int});
  }
  // A forward of any head dim may have been on the Hopper kernel; its gradient is on the portable one if too wide.
  checks.that(call.kernel != 90 || (capability_of(q) == 90 && call.softmax_scale > 0.0),
              "kernel is sm90, expected sm80 for a GPU of capability " + std::to_string(capability_of(q)) +
                  " and softmax_scale " + std::to_string(call.softmax_scale));
  if (q.numel() == 0 && k.numel() == 0) {
    return {empty(q, shape_of(q), q.scalar_type()), empty(k, shape_of(k), k.scalar_type()),
            empty(v, shape_of(v), v.scalar_type())};
  }
  const bool any = q.numel() > 0 && k.numel() > 0 && call.max_seqlen_q > 0 && call.max_seqlen_k > 0;
  if (any && call.kernel != 80 && fits_sm90(q, v, call) &&
      (call.kernel == 90 || !better_on_sm80(q, k, v, num_seqs, call))) {
    return run_sm90(op, dout, q, k, v, out, lse, dlse, alibi_slopes, lengths, num_seqs, call);
  }
  checks.that(shared_memory_of(q) >= kFlashBwdSm80SharedMemory, "this GPU gives a thread block " +
                                                                    std::to_string(shared_memory_of(q)) +
                                                                    " bytes of shared memory, expected 160 KiB");
  return run_sm80(op, dout, q, k, v, out, lse, dlse, alibi_slopes, lengths, num_seqs, call);
}

Gradients batch_attention_backward_op(const Tensor& dout_given, const Tensor& q_given, const Tensor& k_given,
                                      const Tensor& v_given, const Tensor& out_given, const Tensor& lse,
                                      const std::optional<Tensor>& dlse_given,
                                      const std::optional<Tensor>& alibi_slopes, double softmax_scale, bool causal,
                                      int64_t window_left, int64_t window_right, double softcap, bool deterministic,
                                      int64_t kernel) {
  const char* const op = "batch_attention_backward";
  const Checks checks(op, "q", q_given);
  const OnDeviceOf guard(q_given);
  checks.shape("q", q_given, {kAny, kAny, kAny, kAny}).dtype("q", q_given, kHalves);
  const Tensor q = with_aligned_rows(q_given), k = with_aligned_rows(k_given), v = with_aligned_rows(v_given);
  const Tensor out = with_aligned_rows(out_given), dout = with_aligned_rows(dout_given);
  const std::optional<Tensor> dlse = with_contiguous_rows(dlse_given);
  const int64_t num_seqs = q.size(0), q_len = q.size(1), num_heads = q.size(2);
  checks.shape("k", k, {num_seqs, kAny, kAny, q.size(3)});
  const int64_t k_len = k.size(1);
  checks.shape("v", v, {num_seqs, k_len, k.size(2), kAny});
  checks.shape("out", out, {num_seqs, q_len, num_heads, v.size(3)});
  checks.shape("dout", dout, {num_seqs, q_len, num_heads, v.size(3)});
  checks.shape("lse", lse, {num_seqs, num_heads, q_len});
  if (dlse) checks.shape("dlse", *dlse, {num_seqs, num_heads, q_len});
  return run(op, checks, dout, q, k, v, out, lse, dlse, alibi_slopes, {}, num_seqs,
             {q_len, k_len, softmax_scale, causal, window_left, window_right, softcap, deterministic, kernel});
}

Gradients varlen_attention_backward_op(const Tensor& dout_given, const Tensor& q_given, const Tensor& k_given,
                                       const Tensor& v_given, const Tensor& out_given, const Tensor& lse,
                                       const std::optional<Tensor>& dlse_given, const Tensor& cu_seqlens_q,
                                       const Tensor& cu_seqlens_k, const std::optional<Tensor>& seqused_q,
                                       const std::optional<Tensor>& seqused_k,
                                       const std::optional<Tensor>& alibi_slopes, int64_t max_seqlen_q,
                                       int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
                                       int64_t window_right, double softcap, bool deterministic, int64_t kernel) {
  const char* const op = "varlen_attention_backward";
  const Checks checks(op, "q", q_given);
  const OnDeviceOf guard(q_given);
  checks.shape("q", q_given, {kAny, kAny, kAny}).dtype("q", q_given, kHalves);
  const Tensor q = with_aligned_rows(q_given), k = with_aligned_rows(k_given), v = with_aligned_rows(v_given);
  const Tensor out = with_aligned_rows(out_given), dout = with_aligned_rows(dout_given);
  const std::optional<Tensor> dlse = with_contiguous_rows(dlse_given);
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
  return run(
      op, checks, dout, q, k, v, out, lse, dlse, alibi_slopes, {cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k},
      cu_seqlens_q.size(0) - 1,
      {max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap, deterministic, kernel});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("batch_attention_backward", TORCH_BOX(&batch_attention_backward_op));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward_op));
}

}  // namespace fastattn
