#include <algorithm>

#include "attention/flash_fwd_sm90.h"
#include "attention/flash_sm80.h"
#include "attention/paged_decode.h"
#include "torch/attention_call.h"

namespace fastattn {
namespace {

struct Results {
  Tensor out, lse;
};

// Not written yet: (B, H, Sq), packed (H, T).
Tensor new_lse(const AttentionCall& call) {
  const Tensor& q = call.q;
  const int64_t batch = q.dim() - 4;  // where the batch dimension is; -1 if packed
  std::vector<int64_t> shape = {q.size(batch + 2), q.size(batch + 1)};
  if (batch >= 0) shape.insert(shape.begin(), q.size(0));
  return empty(q, shape, ScalarType::Float);
}

ScalarType out_dtype(const AttentionCall& call) {
  if (call.out_scale) return ScalarType::Float8_e4m3fn;
  return is_fp8(call.q) ? ScalarType::BFloat16 : call.q.scalar_type();
}

// Not written yet. out is like q, with V's head dim.
Results new_results(const AttentionCall& call) {
  std::vector<int64_t> shape = shape_of(call.q);
  shape.back() = call.v_head_dim();
  return {empty(call.q, shape, out_dtype(call)), new_lse(call)};
}

PagedDecodeConfig decode_config_of(const AttentionCall& call) {
  return paged_decode_config({call.num_seqs, call.num_heads(), call.num_kv_heads(),
                              std::max(call.head_dim(), call.v_head_dim()), call.max_seqlen_q, call.max_seqlen_k,
                              num_sms_of(call.q), max_smem_of(call.q) >= 227 << 10, is_8bit(call.k), call.beside,
                              call.batch_invariant, call.tree_mask.has_value()});
}

FlashFwdSm90Config sm90_config_of(const AttentionCall& call) {
  const bool extras = call.softcap > 0.0 || call.alibi_slopes || call.sinks || call.seqused_q || call.out_scale;
  return flash_fwd_sm90_config({call.num_seqs, call.num_heads(), call.num_kv_heads(), call.head_dim(),
                                call.v_head_dim(), call.max_seqlen_q, call.max_seqlen_k,
                                call.causal || call.window_right == 0, num_sms_of(call.q),
                                call.q.dim() == 3 ? call.q.size(0) : -1, extras, is_fp8(call.q),
                                !is_fp8(call.q) && is_8bit(call.k), call.min_q_len > 0, call.batch_invariant});
}

// Whether a call goes to the Hopper kernel, which needs some of q. If it does not say: that one takes 64 rows of one
// head at a time, so that the decode kernel, which packs the heads of a group, is better where they are one tile of
// rows; but it has no fp8.
bool for_sm90(const Checks& checks, const AttentionCall& call) {
  const auto few_rows = [&] {
    const PagedDecodeConfig decode = decode_config_of(call);
    return decode.fits && decode.num_row_tiles == 1;
  };
  const bool fp8 = is_fp8(call.q), any = call.q.numel() > 0;
  const bool sm90 = any && (call.kernel == 90 || (call.kernel == 0 && possible_on_sm90(call) && (fp8 || !few_rows())));
  checks.that(sm90 || !fp8 || !any, "the kernel sm80 has no float8_e4m3fn inputs");
  return sm90;
}

cudaError_t run(const Tensor& q, PagedDecodeParams p, cudaStream_t stream) {
  const int64_t num_marks = p.config.slots_of_area > 0 ? p.config.num_teams : 0;
  const int64_t num_slots = 2 * p.config.num_teams * p.config.slots_of_area;
  Tensor partial_out = empty(q, {num_slots, p.config.rows_of_slot, p.v_head_dim}, ScalarType::Float);
  Tensor partial_sum = empty(q, {num_slots, p.config.rows_of_slot, 2}, ScalarType::Float);
  Tensor marks = empty(q, {num_marks}, ScalarType::Long);
  p.partial_out = static_cast<float*>(partial_out.data_ptr());
  p.partial_sum = static_cast<float2*>(partial_sum.data_ptr());
  p.marks = static_cast<uint64_t*>(marks.data_ptr());
  return paged_decode(p, stream);
}

cudaError_t run(const Tensor& q, FlashSm80Params p, cudaStream_t stream) {
  MaybeTensor partial_out, partial_lse;
  if (p.config.num_splits > 1 || p.out_scale != nullptr) {
    partial_out = empty(q, {p.config.num_splits, p.num_tokens, p.num_heads, p.v_head_dim}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial_out->data_ptr());
  }
  if (p.config.num_splits > 1) {
    partial_lse = empty(q, {p.config.num_splits, p.num_heads, p.num_tokens}, ScalarType::Float);
    p.partial_lse = static_cast<float*>(partial_lse->data_ptr());
  }
  return flash_sm80_forward(p, stream);
}

// On a portable kernel; pages are in the parameters already.
void run_portable(const char* op, AttentionParams p, const AttentionCall& call, const Results& results) {
  if (call.q.numel() == 0) return;
  const int64_t batch = call.q.dim() - 4;  // where the batch dimension is; -1 if packed
  const int64_t token = batch + 1, head = batch + 2;
  const Tensor q = with_aligned_rows(call.q);
  const Tensor k = p.paged ? call.k : with_aligned_rows(call.k), v = p.paged ? call.v : with_aligned_rows(call.v);
  fill_params(p, call);
  if (call.sinks) p.sinks = data<float>(*call.sinks);
  if (call.out_scale) p.out_scale = data<float>(*call.out_scale);
  if (call.tree_mask) p.tree_mask = data<int64_t>(*call.tree_mask);
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = results.out.data_ptr();
  p.lse = static_cast<float*>(results.lse.data_ptr());
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
  const PagedDecodeConfig decode = decode_config_of(call);
  if (decode.fits) {
    PagedDecodeParams own;
    static_cast<AttentionParams&>(own) = p;
    own.config = decode;
    own.max_q_len = static_cast<int32_t>(call.max_q_len);
    own.kv_dtype = dtype_of(k);
    own.k_scale = kv_scale_of(call.k_scale);
    own.v_scale = kv_scale_of(call.v_scale);
    own.scales_of_tokens = call.k_scale && call.k_scale->dim() == 3;
    check_launch(op, run(q, own, stream_of(q)));
  } else {
    FlashSm80Params own;
    static_cast<AttentionParams&>(own) = p;
    own.config = flash_sm80_config({call.num_seqs, call.num_heads(), call.num_kv_heads(),
                                    std::max(call.head_dim(), call.v_head_dim()), call.max_seqlen_q, call.max_seqlen_k,
                                    num_sms_of(call.q), call.batch_invariant});
    own.min_q_len = static_cast<int32_t>(call.min_q_len);
    own.max_q_len = static_cast<int32_t>(call.max_q_len);
    // Who adds up splits writes all rows, also those that another kernel has written.
    if (call.min_q_len > 0 || call.max_q_len < INT32_MAX) own.config.num_splits = 1;
    check_launch(op, run(q, own, stream_of(q)));
  }
}

Tensor new_tile_counter(const AttentionCall& call) { return empty(call.q, {1}, ScalarType::Int); }

// Whether the prompts of a mixed batch share the SMs with the rest: they are bound by the tensor cores, and that by
// memory. Not where there are trees, for a third kernel; where q is copied, between the two; or where keys are split,
// which leaves something in the others' rows too and must come first.
bool shares_sms(const AttentionCall& prompts) {
  return !prompts.tree_mask && rows_distinct(prompts.q) && sm90_config_of(prompts).num_splits == 1;
}

// On the Hopper kernel: there are some of q.
void run_sm90(const char* op, const AttentionCall& call, const Results& results, const Tensor& tile_counter) {
  const Tensor q = with_distinct_rows(call.q), k = with_distinct_rows(call.k), v = with_distinct_rows(call.v);
  const int64_t batch = q.dim() - 4;  // where the batch dimension is; -1 if packed
  const int64_t token = batch + 1, head = batch + 2;
  const auto& [out, lse] = results;
  FlashFwdSm90Params p;
  fill_params(p, call);
  if (call.sinks) p.sinks = data<float>(*call.sinks);
  if (call.out_scale) p.out_scale = data<float>(*call.out_scale);
  const auto descale = [](const MaybeTensor& t) {
    return t ? FlashDescale{data<float>(*t), t->stride(0), t->stride(1)} : FlashDescale{};
  };
  p.q_descale = descale(call.q_descale);
  p.k_descale = descale(call.k_descale);
  p.v_descale = descale(call.v_descale);
  p.kv_dtype = dtype_of(k);
  if (call.k_scale && call.k_scale->dim() == 1) {  // of a KV head: the same for all sequences
    p.k_descale = {data<float>(*call.k_scale), 0, call.k_scale->stride(0)};
    p.v_descale = {data<float>(*call.v_scale), 0, call.v_scale->stride(0)};
  } else if (call.k_scale) {
    p.k_scale = kv_scale_of(call.k_scale);
    p.v_scale = kv_scale_of(call.v_scale);
  }
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.tile_counter = static_cast<int32_t*>(tile_counter.data_ptr());
  if (batch >= 0) {
    p.q_batch_stride = q.stride(0);
    p.out_batch_stride = out.stride(0);
    p.lse_batch_stride = lse.stride(0);
  }
  if (k.dim() == 4) {
    p.k_batch_stride = k.stride(0);
    p.v_batch_stride = v.stride(0);
  }
  if (call.block_table) {
    p.block_table = data<int32_t>(*call.block_table);
    p.block_table_stride = call.block_table->stride(0);
    // Keys are counted in int32, and a little behind the last one.
    p.max_blocks = static_cast<int32_t>(std::min(call.block_table->size(1), (INT32_MAX - 8192) / k.size(1)));
    p.num_pages = k.size(0);
  }
  p.q_token_stride = q.stride(token);
  p.q_head_stride = q.stride(head);
  p.k_token_stride = k.stride(k.dim() - 3);
  p.k_head_stride = k.stride(k.dim() - 2);
  p.v_token_stride = v.stride(k.dim() - 3);
  p.v_head_stride = v.stride(k.dim() - 2);
  p.out_token_stride = out.stride(token);
  p.out_head_stride = out.stride(head);
  p.lse_head_stride = lse.stride(batch + 1);
  p.q_tokens = q.size(token);
  p.k_tokens = k.size(k.dim() - 3);
  p.num_tokens = batch < 0 ? p.q_tokens : p.num_seqs * p.q_tokens;
  p.config = sm90_config_of(call);
  MaybeTensor partial_out, partial_lse;
  if (p.config.num_splits > 1) {
    partial_out = empty(q, {p.config.num_splits, p.num_tokens, p.num_heads, p.v_head_dim}, ScalarType::Float);
    partial_lse = empty(q, {p.config.num_splits, p.num_heads, p.num_tokens}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial_out->data_ptr());
    p.partial_lse = static_cast<float*>(partial_lse->data_ptr());
  }
  p.min_q_len = static_cast<int32_t>(call.min_q_len);
  p.beside = call.beside;
  check_launch(op, flash_fwd_sm90(p, stream_of(q)));
}

// A call without pages.
std::tuple<Tensor, Tensor> run(const char* op, const Checks& checks, const AttentionCall& call) {
  const OnDeviceOf guard(call.q);
  const Results results = new_results(call);
  if (for_sm90(checks, call)) {
    run_sm90(op, call, results, new_tile_counter(call));
  } else {
    run_portable(op, {}, call, results);
  }
  return {results.out, results.lse};
}

AttentionCall checked_pages(const Checks& checks, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                            const Tensor& cu_seqlens_q, const Tensor& seqused_k, const Tensor& block_table,
                            const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& k_scale,
                            const MaybeTensor& v_scale, const MaybeTensor& tree_mask, const MaybeTensor& out_scale,
                            int64_t max_seqlen_q, double softmax_scale, bool causal, int64_t window_left,
                            int64_t window_right, double softcap, bool batch_invariant) {
  checks.shape("q", q, {kAny, kAny, kAny}).dtype("q", q, kHalves);
  checks.caches(q, k_cache, v_cache, k_scale, v_scale);
  checks.shape("seqused_k", seqused_k, {kAny}).dtype("seqused_k", seqused_k, {ScalarType::Int});
  const int64_t num_seqs = seqused_k.size(0);
  checks.shape("cu_seqlens_q", cu_seqlens_q, {num_seqs + 1}).dtype("cu_seqlens_q", cu_seqlens_q, {ScalarType::Int});
  checks.shape("block_table", block_table, {num_seqs, kAny}).dtype("block_table", block_table, {ScalarType::Int});
  if (tree_mask) {
    checks.shape("tree_mask", *tree_mask, {q.size(0)}).dtype("tree_mask", *tree_mask, {ScalarType::Long});
    checks.that(causal, "causal is false, expected true with tree_mask");
  }
  if (out_scale) checks.shape("out_scale", *out_scale, {1}).dtype("out_scale", *out_scale, {ScalarType::Float});
  // A copy of the cache at every call would hide a slowness of orders of magnitude.
  checks.that(
      rows_aligned(k_cache) && rows_aligned(v_cache),
      "k_cache and v_cache have rows that are not 16-byte aligned, expected strides that are multiples of 16 bytes");
  const AttentionCall call = {.q = q,
                              .k = k_cache,
                              .v = v_cache,
                              .cu_seqlens_q = cu_seqlens_q,
                              .seqused_k = seqused_k,
                              .block_table = block_table,
                              .alibi_slopes = alibi_slopes,
                              .sinks = sinks,
                              .k_scale = k_scale,
                              .v_scale = v_scale,
                              .tree_mask = tree_mask,
                              .out_scale = out_scale,
                              .num_seqs = num_seqs,
                              .max_seqlen_q = max_seqlen_q,
                              .max_seqlen_k = block_table.size(1) * k_cache.size(1),
                              .softmax_scale = softmax_scale,
                              .causal = causal,
                              .window_left = window_left,
                              .window_right = window_right,
                              .softcap = softcap,
                              .batch_invariant = batch_invariant};
  check_call(checks, call);
  checks.that(!is_8bit(k_cache) || q.numel() == 0 || decode_config_of(call).fits,
              "block_table has room for 2^30 tiles of keys or more");
  return call;
}

// Over pages, into results that are contiguous.
void run_paged(const char* op, const Checks& checks, const AttentionCall& call, const Results& results) {
  const Tensor &q = call.q, &k_cache = call.k, &v_cache = call.v, &block_table = *call.block_table;
  const MaybeTensor& tree_mask = call.tree_mask;
  const int64_t num_seqs = call.num_seqs, max_seqlen_q = call.max_seqlen_q;
  // The copy engine brings 8 rows of a page at least, as its swizzle repeats, of what is there and does not repeat. The
  // Hopper kernel takes a tile for each query head, or packs the heads of a group where rows are few: then it is better
  // than two tiles of the decode kernel's, which bring K and V out of the L2 cache twice, unless K and V are few bytes.
  // In a mixed batch with prompts, where it does not, a single token would take as many: those are left to the decode
  // kernel. It has no trees: sequences that may be one and are too long for the decode kernel are flash_sm80's.
  // Batch-invariant, who has a sequence follows from its own number of tokens.
  const bool copyable = k_cache.numel() > 0 && block_table.numel() > 0 && k_cache.size(1) % 8 == 0 &&
                        rows_distinct(k_cache) && rows_distinct(v_cache);
  const int64_t few_tokens = paged_decode_most_tokens(call.num_heads() / call.num_kv_heads());
  const int64_t least_tokens = tree_mask              ? kMaxTreeTokens + 1
                               : call.batch_invariant ? few_tokens + 1
                                                      : 64;  // of a prompt
  const int64_t few_rows = is_8bit(k_cache) || call.head_dim() <= 64 ? 63 : kPagedDecodeRows;
  const bool many_rows = !tree_mask && max_seqlen_q * call.num_heads() > few_rows * call.num_kv_heads();
  const bool long_ones = max_seqlen_q >= least_tokens || (many_rows && sm90_config_of(call).packs);
  const bool sm90 = copyable && long_ones && for_sm90(checks, call);
  const bool mixed =
      sm90 && max_seqlen_q >= least_tokens && (few_tokens > 0 || tree_mask) && q.size(0) < num_seqs * max_seqlen_q;
  AttentionCall long_call = call;
  if (mixed) long_call.min_q_len = tree_mask ? least_tokens : few_tokens + 1;
  const bool beside = mixed && shares_sms(long_call);
  long_call.beside = beside;
  if (sm90 && !beside) {
    run_sm90(op, long_call, results, new_tile_counter(call));
    if (!mixed) return;
  }
  AttentionParams p;
  p.paged = true;
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
  const auto run_lengths = [&](int64_t min_q_len, int64_t max_q_len) {
    AttentionCall short_call = call;
    short_call.min_q_len = min_q_len;
    short_call.max_seqlen_q = short_call.max_q_len = max_q_len;
    short_call.beside = beside;
    run_portable(op, p, short_call, results);
  };
  if (!mixed && call.batch_invariant && !is_8bit(k_cache) && max_seqlen_q > few_tokens) {
    run_lengths(few_tokens + 1, max_seqlen_q);
    if (few_tokens > 0) run_lengths(0, few_tokens);
  } else if (!mixed) {
    run_portable(op, p, call, results);
  } else if (beside) {
    // The decode kernel has some of the SMs, and leaves each when it has ended there; the other one begins with it, and
    // takes all others, and then those. Nothing may come between the two.
    Tensor tile_counter = new_tile_counter(call);
    check_launch(op, cudaMemsetAsync(tile_counter.data_ptr(), 0, sizeof(int32_t), stream_of(q)));
    run_lengths(0, few_tokens);
    run_sm90(op, long_call, results, tile_counter);
  } else if (tree_mask && is_8bit(k_cache)) {
    run_lengths(0, kMaxTreeTokens);  // all on the decode kernel
  } else {
    if (tree_mask) run_lengths(few_tokens + 1, kMaxTreeTokens);
    if (few_tokens > 0) run_lengths(0, few_tokens);
  }
}

std::tuple<Tensor, Tensor> paged_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                              const Tensor& cu_seqlens_q, const Tensor& seqused_k,
                                              const Tensor& block_table, const MaybeTensor& alibi_slopes,
                                              const MaybeTensor& sinks, const MaybeTensor& k_scale,
                                              const MaybeTensor& v_scale, const MaybeTensor& tree_mask,
                                              const MaybeTensor& out_scale, int64_t max_seqlen_q, double softmax_scale,
                                              bool causal, int64_t window_left, int64_t window_right, double softcap,
                                              bool batch_invariant) {
  const char* const op = "paged_attention";
  const Checks checks(op, "q", q);
  const AttentionCall call = checked_pages(checks, q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table,
                                           alibi_slopes, sinks, k_scale, v_scale, tree_mask, out_scale, max_seqlen_q,
                                           softmax_scale, causal, window_left, window_right, softcap, batch_invariant);
  const OnDeviceOf guard(q);
  const Results results = new_results(call);
  run_paged(op, checks, call, results);
  return {results.out, results.lse};
}

// The same into memory of the caller's.
Tensor paged_attention_out_op(const Tensor& out, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                              const Tensor& cu_seqlens_q, const Tensor& seqused_k, const Tensor& block_table,
                              const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& k_scale,
                              const MaybeTensor& v_scale, const MaybeTensor& tree_mask, const MaybeTensor& out_scale,
                              int64_t max_seqlen_q, double softmax_scale, bool causal, int64_t window_left,
                              int64_t window_right, double softcap, bool batch_invariant) {
  const char* const op = "paged_attention";
  const Checks checks(op, "q", q);
  const AttentionCall call = checked_pages(checks, q, k_cache, v_cache, cu_seqlens_q, seqused_k, block_table,
                                           alibi_slopes, sinks, k_scale, v_scale, tree_mask, out_scale, max_seqlen_q,
                                           softmax_scale, causal, window_left, window_right, softcap, batch_invariant);
  checks.shape("out", out, {q.size(0), q.size(1), q.size(2)}).dtype("out", out, {out_dtype(call)});
  checks.that(out.is_contiguous() && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0,
              "out is not contiguous from a multiple of 16 bytes on");
  const OnDeviceOf guard(q);
  const Results results = {out, new_lse(call)};
  run_paged(op, checks, call, results);
  return results.lse;
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
  const AttentionCall call = {.q = q,
                              .k = k,
                              .v = v,
                              .cu_seqlens_q = cu_seqlens_q,
                              .cu_seqlens_k = cu_seqlens_k,
                              .seqused_q = seqused_q,
                              .seqused_k = seqused_k,
                              .alibi_slopes = alibi_slopes,
                              .sinks = sinks,
                              .q_descale = q_descale,
                              .k_descale = k_descale,
                              .v_descale = v_descale,
                              .num_seqs = cu_seqlens_q.size(0) - 1,
                              .max_seqlen_q = max_seqlen_q,
                              .max_seqlen_k = max_seqlen_k,
                              .softmax_scale = softmax_scale,
                              .causal = causal,
                              .window_left = window_left,
                              .window_right = window_right,
                              .softcap = softcap,
                              .kernel = kernel};
  check_call(checks, call);
  return run(op, checks, call);
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
  const AttentionCall call = {.q = q,
                              .k = k,
                              .v = v,
                              .alibi_slopes = alibi_slopes,
                              .sinks = sinks,
                              .q_descale = q_descale,
                              .k_descale = k_descale,
                              .v_descale = v_descale,
                              .num_seqs = q.size(0),
                              .max_seqlen_q = q.size(1),
                              .max_seqlen_k = k.size(1),
                              .softmax_scale = softmax_scale,
                              .causal = causal,
                              .window_left = window_left,
                              .window_right = window_right,
                              .softcap = softcap,
                              .kernel = kernel};
  check_call(checks, call);
  return run(op, checks, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_op));
  m.impl("paged_attention_out", TORCH_BOX(&paged_attention_out_op));
  m.impl("varlen_attention", TORCH_BOX(&varlen_attention_op));
  m.impl("batch_attention", TORCH_BOX(&batch_attention_op));
}

}  // namespace fastattn
