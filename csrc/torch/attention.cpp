#include <algorithm>

#include "attention/flash_fwd_sm90.h"
#include "attention/flash_sm80.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

bool is_fp8(const Tensor& t) { return t.scalar_type() == ScalarType::Float8_e4m3fn; }
ScalarType out_dtype(const Tensor& q) { return is_fp8(q) ? ScalarType::BFloat16 : q.scalar_type(); }

// Every row begins at a multiple of 16 bytes, which is what cp.async and the copy engine copy.
bool rows_aligned(const Tensor& t) {
  const int64_t elements = is_fp8(t) ? 16 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % elements == 0);
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

using MaybeTensor = std::optional<Tensor>;

// A call's q (B, Sq, H, D), or packed (T, H, D), its k and v alike, and all that says which scores count how much.
struct Call {
  Tensor q, k, v;
  MaybeTensor cu_seqlens_q, cu_seqlens_k;  // packed only
  MaybeTensor seqused_q, seqused_k;
  MaybeTensor alibi_slopes, sinks;
  MaybeTensor q_descale, k_descale, v_descale;
  int64_t num_seqs, max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  int64_t kernel;

  int64_t num_heads() const { return q.size(q.dim() - 2); }
  int64_t num_kv_heads() const { return v.size(v.dim() - 2); }
  int64_t head_dim() const { return q.size(q.dim() - 1); }
  int64_t v_head_dim() const { return v.size(v.dim() - 1); }
};

void check_head_dim(const Checks& checks, const char* name, const Tensor& t) {
  const int64_t head_dim = t.size(t.dim() - 1), multiple = is_fp8(t) ? 16 : 8;
  checks.that(head_dim > 0 && head_dim % multiple == 0 && head_dim <= 256,
              std::string(name) + " has head dim " + std::to_string(head_dim) + ", expected a multiple of " +
                  std::to_string(multiple) + " up to 256");
}

// Whatever all operators have: heads and options.
void check_call(const Checks& checks, const Call& call) {
  check_head_dim(checks, "q", call.q);
  check_head_dim(checks, "v", call.v);
  const int64_t num_heads = call.num_heads(), num_kv_heads = call.num_kv_heads();
  checks.that(num_kv_heads > 0 && num_heads % num_kv_heads == 0, "q has " + std::to_string(num_heads) +
                                                                     " heads, expected a multiple of " +
                                                                     std::to_string(num_kv_heads) + " KV heads");
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
}

// What a kernel cannot do yet, in words; nullptr if a call is nothing of it.
const char* missing_in_sm80(const Call& call) { return is_fp8(call.q) ? "float8_e4m3fn inputs" : nullptr; }

FlashSm80Config sm80_config_of(const Call& call) {
  return flash_sm80_config({call.num_seqs, call.num_heads(), call.num_kv_heads(),
                            std::max(call.head_dim(), call.v_head_dim()), call.max_seqlen_q, call.max_seqlen_k,
                            num_sms_of(call.q)});
}

// Whether a call goes to the Hopper kernel, which needs some of q. If it does not say: that one takes 64 rows of
// one head at a time, so that the portable one, which packs the heads of a group into one tile, is better where there
// are few.
bool for_sm90(const Checks& checks, const Call& call) {
  const int capability = capability_of(call.q);
  const bool possible = capability == 90 && call.softmax_scale > 0.0;
  checks.that(call.kernel != 90 || possible, "kernel is sm90, expected sm80 for a GPU of capability " +
                                                 std::to_string(capability) + " and softmax_scale " +
                                                 std::to_string(call.softmax_scale));
  const char* const missing80 = missing_in_sm80(call);
  const bool better = missing80 != nullptr || !sm80_config_of(call).decode;
  const bool sm90 = call.q.numel() > 0 && (call.kernel == 90 || (call.kernel == 0 && possible && better));
  if (!sm90 && missing80 != nullptr && call.q.numel() > 0) {
    checks.that(false, std::string("the kernel sm80 has no ") + missing80);
  }
  return sm90;
}

// What the parameters of both kernels have in common.
template <typename Params>
void fill_params(Params& p, const Call& call) {
  p.num_seqs = static_cast<int32_t>(call.num_seqs);
  p.num_heads = static_cast<int32_t>(call.num_heads());
  p.num_kv_heads = static_cast<int32_t>(call.num_kv_heads());
  p.head_dim = static_cast<int32_t>(call.head_dim());
  p.v_head_dim = static_cast<int32_t>(call.v_head_dim());
  p.softmax_scale = static_cast<float>(call.softmax_scale);
  p.softcap = static_cast<float>(call.softcap);
  p.window_left = window(call.window_left);
  p.window_right = call.causal ? 0 : window(call.window_right);
  if (call.cu_seqlens_q) p.cu_seqlens_q = data<int32_t>(*call.cu_seqlens_q);
  if (call.cu_seqlens_k) p.cu_seqlens_k = data<int32_t>(*call.cu_seqlens_k);
  if (call.seqused_q) p.seqused_q = data<int32_t>(*call.seqused_q);
  if (call.seqused_k) p.seqused_k = data<int32_t>(*call.seqused_k);
  if (call.alibi_slopes) {
    p.alibi_slopes = data<float>(*call.alibi_slopes);
    if (call.alibi_slopes->dim() == 2) p.alibi_batch_stride = call.alibi_slopes->stride(0);
  }
  if (call.sinks) p.sinks = data<float>(*call.sinks);
}

// On the portable kernel; pages are in the parameters already.
std::tuple<Tensor, Tensor> run_sm80(const char* op, FlashSm80Params p, const Call& call) {
  const int64_t batch = call.q.dim() - 4;  // where the batch dimension is; -1 if packed
  const int64_t token = batch + 1, head = batch + 2;
  std::vector<int64_t> out_shape = shape_of(call.q);
  out_shape.back() = call.v_head_dim();
  Tensor out = empty(call.q, out_shape, out_dtype(call.q));
  std::vector<int64_t> lse_shape = {call.q.size(head), call.q.size(token)};
  if (batch >= 0) lse_shape.insert(lse_shape.begin(), call.q.size(0));
  Tensor lse = empty(call.q, lse_shape, ScalarType::Float);
  if (call.q.numel() == 0) return {out, lse};

  const Tensor q = with_aligned_rows(call.q);
  const Tensor k = p.paged ? call.k : with_aligned_rows(call.k), v = p.paged ? call.v : with_aligned_rows(call.v);
  fill_params(p, call);
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.q_token_stride = q.stride(token);
  p.q_head_stride = q.stride(head);
  p.num_tokens = q.size(token);
  if (batch >= 0) {
    p.q_batch_stride = q.stride(0);
    p.k_batch_stride = k.stride(0);
    p.v_batch_stride = v.stride(0);
    p.batch_q_len = static_cast<int32_t>(q.size(token));
    p.batch_k_len = static_cast<int32_t>(k.size(token));
    p.num_tokens *= q.size(0);
  }
  if (!p.paged) {
    p.k_token_stride = k.stride(token);
    p.k_head_stride = k.stride(head);
    p.v_token_stride = v.stride(token);
    p.v_head_stride = v.stride(head);
  }
  p.dtype = dtype_of(q);
  p.config = sm80_config_of(call);
  MaybeTensor partial_out, partial_lse;
  if (p.config.num_splits > 1) {
    partial_out = empty(q, {p.config.num_splits, p.num_tokens, p.num_heads, p.v_head_dim}, ScalarType::Float);
    partial_lse = empty(q, {p.config.num_splits, p.num_heads, p.num_tokens}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial_out->data_ptr());
    p.partial_lse = static_cast<float*>(partial_lse->data_ptr());
  }
  check_launch(op, flash_sm80_forward(p, stream_of(q)));
  return {out, lse};
}

// On the Hopper kernel: there are some of q.
std::tuple<Tensor, Tensor> run_sm90(const char* op, const Call& call) {
  const Tensor q = with_distinct_rows(call.q), k = with_distinct_rows(call.k), v = with_distinct_rows(call.v);
  const int64_t batch = q.dim() - 4;  // where the batch dimension is; -1 if packed
  const int64_t token = batch + 1, head = batch + 2;
  std::vector<int64_t> out_shape = shape_of(q);
  out_shape.back() = call.v_head_dim();
  Tensor out = empty(q, out_shape, out_dtype(q));
  Tensor lse = batch < 0 ? empty(q, {q.size(head), q.size(token)}, ScalarType::Float)
                         : empty(q, {q.size(0), q.size(head), q.size(token)}, ScalarType::Float);
  Tensor tile_counter = empty(q, {1}, ScalarType::Int);
  FlashFwdSm90Params p;
  fill_params(p, call);
  const auto descale = [](const MaybeTensor& t) {
    return t ? FlashDescale{data<float>(*t), t->stride(0), t->stride(1)} : FlashDescale{};
  };
  p.q_descale = descale(call.q_descale);
  p.k_descale = descale(call.k_descale);
  p.v_descale = descale(call.v_descale);
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.tile_counter = static_cast<int32_t*>(tile_counter.data_ptr());
  if (batch >= 0) {
    p.q_batch_stride = q.stride(0);
    p.k_batch_stride = k.stride(0);
    p.v_batch_stride = v.stride(0);
    p.out_batch_stride = out.stride(0);
    p.lse_batch_stride = lse.stride(0);
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
  p.dtype = dtype_of(q);
  p.config = flash_fwd_sm90_config({p.num_seqs, p.num_heads, p.num_kv_heads, p.head_dim, p.v_head_dim,
                                    call.max_seqlen_q, call.max_seqlen_k, p.window_right == 0, num_sms_of(q),
                                    flash_fwd_sm90_extras(p), is_fp8(q)});
  MaybeTensor partial_out, partial_lse;
  if (p.config.num_splits > 1) {
    partial_out = empty(q, {p.config.num_splits, p.num_tokens, p.num_heads, p.v_head_dim}, ScalarType::Float);
    partial_lse = empty(q, {p.config.num_splits, p.num_heads, p.num_tokens}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial_out->data_ptr());
    p.partial_lse = static_cast<float*>(partial_lse->data_ptr());
  }
  check_launch(op, flash_fwd_sm90(p, stream_of(q)));
  return {out, lse};
}

std::tuple<Tensor, Tensor> paged_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& cu_seqlens_q, const Tensor& seqused_k,
                                              const Tensor& block_table, const MaybeTensor& alibi_slopes,
                                              const MaybeTensor& sinks, int64_t max_seqlen_q, double softmax_scale,
                                              bool causal, int64_t window_left, int64_t window_right, double softcap) {
  const char* const op = "paged_attention";
  const Checks checks(op, "q", q);
  checks.shape("q", q, {kAny, kAny, kAny}).dtype("q", q, kHalves);
  checks.shape("k_cache", k_cache, {kAny, kAny, kAny, q.size(2)}).dtype("k_cache", k_cache, {q.scalar_type()});
  checks.shape("v_cache", v_cache, {k_cache.size(0), k_cache.size(1), k_cache.size(2), q.size(2)})
      .dtype("v_cache", v_cache, {q.scalar_type()});
  checks.shape("seqused_k", seqused_k, {kAny}).dtype("seqused_k", seqused_k, {ScalarType::Int});
  const int64_t num_seqs = seqused_k.size(0);
  checks.shape("cu_seqlens_q", cu_seqlens_q, {num_seqs + 1}).dtype("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int});
  checks.shape("block_table", block_table, {num_seqs, kAny}).dtype("block_table", block_table, {ScalarType::Int});
  // A copy of the cache at every call would hide a slowness of orders of magnitude.
  checks.that(rows_aligned(k_cache) && rows_aligned(v_cache),
              "k_cache and v_cache have rows that are not 16-byte aligned, expected strides that are multiples of 8");
  Call call = {q, k_cache, v_cache, cu_seqlens_q};
  call.alibi_slopes = alibi_slopes;
  call.sinks = sinks;
  call.num_seqs = num_seqs;
  call.max_seqlen_q = max_seqlen_q;
  call.max_seqlen_k = block_table.size(1) * k_cache.size(1);
  call.softmax_scale = softmax_scale;
  call.causal = causal;
  call.window_left = window_left;
  call.window_right = window_right;
  call.softcap = softcap;
  check_call(checks, call);

  const OnDeviceOf guard(q);
  FlashSm80Params p;
  p.paged = true;
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
  return run_sm80(op, p, call);
}

std::tuple<Tensor, Tensor> varlen_attention_op(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    const MaybeTensor& seqused_q, const MaybeTensor& seqused_k, const MaybeTensor& alibi_slopes,
    const MaybeTensor& sinks, const MaybeTensor& q_descale, const MaybeTensor& k_descale, const MaybeTensor& v_descale,
    int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal, int64_t window_left,
    int64_t window_right, double softcap, bool /*deterministic*/, int64_t kernel) {
  const char* const op = "varlen_attention";
  const Checks checks(op, "q", q);
  checks.shape("q", q, {kAny, kAny, kAny}).dtype("q", q, kAttentionInputs);
  checks.shape("k", k, {kAny, kAny, q.size(2)}).dtype("k", k, {q.scalar_type()});
  checks.shape("v", v, {k.size(0), k.size(1), kAny}).dtype("v", v, {q.scalar_type()});
  checks.shape("cu_seqlens_q", cu_seqlens_q, {kAny}).dtype("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int});
  checks.that(cu_seqlens_q.size(0) > 0, "cu_seqlens_q is empty, expected B + 1 elements");
  checks.shape("cu_seqlens_k", cu_seqlens_k, {cu_seqlens_q.size(0)})
      .dtype("cu_seqlens_k", cu_seqlens_k, {ScalarType::Int});
  const Call call = {q,
                     k,
                     v,
                     cu_seqlens_q,
                     cu_seqlens_k,
                     seqused_q,
                     seqused_k,
                     alibi_slopes,
                     sinks,
                     q_descale,
                     k_descale,
                     v_descale,
                     cu_seqlens_q.size(0) - 1,
                     max_seqlen_q,
                     max_seqlen_k,
                     softmax_scale,
                     causal,
                     window_left,
                     window_right,
                     softcap,
                     kernel};
  check_call(checks, call);

  const OnDeviceOf guard(q);
  return for_sm90(checks, call) ? run_sm90(op, call) : run_sm80(op, {}, call);
}

std::tuple<Tensor, Tensor> batch_attention_op(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                                              const MaybeTensor& q_descale, const MaybeTensor& k_descale,
                                              const MaybeTensor& v_descale, double softmax_scale, bool causal,
                                              int64_t window_left, int64_t window_right, double softcap,
                                              bool /*deterministic*/, int64_t kernel) {
  const char* const op = "batch_attention";
  const Checks checks(op, "q", q);
  checks.shape("q", q, {kAny, kAny, kAny, kAny}).dtype("q", q, kAttentionInputs);
  checks.shape("k", k, {q.size(0), kAny, kAny, q.size(3)}).dtype("k", k, {q.scalar_type()});
  checks.shape("v", v, {q.size(0), k.size(1), k.size(2), kAny}).dtype("v", v, {q.scalar_type()});
  const int64_t num_seqs = q.size(0), q_len = q.size(1), k_len = k.size(1);
  const Call call = {q,
                     k,
                     v,
                     std::nullopt,
                     std::nullopt,
                     std::nullopt,
                     std::nullopt,
                     alibi_slopes,
                     sinks,
                     q_descale,
                     k_descale,
                     v_descale,
                     num_seqs,
                     q_len,
                     k_len,
                     softmax_scale,
                     causal,
                     window_left,
                     window_right,
                     softcap,
                     kernel};
  check_call(checks, call);

  const OnDeviceOf guard(q);
  return for_sm90(checks, call) ? run_sm90(op, call) : run_sm80(op, {}, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_op));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention_op));
  m.impl("batch_attention", TORCH_BOX(&batch_attention_op));
}

}  // namespace fastattn
