// What the operators of attention and those of its gradients have in common.
#pragma once

#include <string>

#include "attention/attention_params.h"
#include "torch/checks.h"

namespace fastattn {

// Every row (last dimension) is contiguous and begins at a multiple of 16 bytes, which is what cp.async and the copy
// engine copy.
bool rows_aligned(const Tensor& t);
Tensor with_aligned_rows(const Tensor& t);

// What the copy engine can be told of: rows as above, and no dimension that repeats the same ones (an expanded tensor).
bool rows_distinct(const Tensor& t);
Tensor with_distinct_rows(const Tensor& t);

// A call's q (B, Sq, H, D), or packed (T, H, D), its k and v alike, and all that says which scores count how much.
struct AttentionCall {
  Tensor q, k, v;
  MaybeTensor cu_seqlens_q = std::nullopt, cu_seqlens_k = std::nullopt;  // packed only
  MaybeTensor seqused_q = std::nullopt, seqused_k = std::nullopt;
  MaybeTensor block_table = std::nullopt;  // k and v are pages (num_pages, page size, Hk, D)
  MaybeTensor alibi_slopes = std::nullopt, sinks = std::nullopt;
  MaybeTensor q_descale = std::nullopt, k_descale = std::nullopt, v_descale = std::nullopt;
  MaybeTensor k_scale = std::nullopt, v_scale = std::nullopt;  // pages of 8 bits only
  MaybeTensor tree_mask = std::nullopt;                        // pages only
  MaybeTensor out_scale = std::nullopt;                        // pages only: out is e4m3
  int64_t num_seqs = 0, max_seqlen_q = 0, max_seqlen_k = 0;
  double softmax_scale = 1.0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0;
  int64_t kernel = 0;
  // Packed only: results are wanted of sequences of so many query tokens.
  int64_t min_q_len = 0, max_q_len = INT32_MAX;
  bool beside = false;           // and of the others by another kernel at the same time
  bool batch_invariant = false;  // pages only: a sequence's result does not depend on the others

  int64_t num_heads() const { return q.size(q.dim() - 2); }
  int64_t num_kv_heads() const { return v.size(v.dim() - 2); }
  int64_t head_dim() const { return q.size(q.dim() - 1); }
  int64_t v_head_dim() const { return v.size(v.dim() - 1); }
};

// Whatever all operators have: heads, options, and the kernel that was asked for.
void check_call(const Checks& checks, const AttentionCall& call);

// Whether the Hopper kernels can do it.
bool possible_on_sm90(const AttentionCall& call);

// As a kernel takes it: no longer than any sequence.
int32_t clamped_window(int64_t size);

// What the parameters of all kernels have in common.
template <typename Params>
void fill_params(Params& p, const AttentionCall& call) {
  p.num_seqs = static_cast<int32_t>(call.num_seqs);
  p.num_heads = static_cast<int32_t>(call.num_heads());
  p.num_kv_heads = static_cast<int32_t>(call.num_kv_heads());
  p.head_dim = static_cast<int32_t>(call.head_dim());
  p.v_head_dim = static_cast<int32_t>(call.v_head_dim());
  p.softmax_scale = static_cast<float>(call.softmax_scale);
  p.softcap = static_cast<float>(call.softcap);
  p.window_left = clamped_window(call.window_left);
  p.window_right = call.causal ? 0 : clamped_window(call.window_right);
  p.dtype = dtype_of(call.q);
  if (call.cu_seqlens_q) p.cu_seqlens_q = data<int32_t>(*call.cu_seqlens_q);
  if (call.cu_seqlens_k) p.cu_seqlens_k = data<int32_t>(*call.cu_seqlens_k);
  if (call.seqused_q) p.seqused_q = data<int32_t>(*call.seqused_q);
  if (call.seqused_k) p.seqused_k = data<int32_t>(*call.seqused_k);
  if (call.alibi_slopes) {
    p.alibi_slopes = data<float>(*call.alibi_slopes);
    if (call.alibi_slopes->dim() == 2) p.alibi_batch_stride = call.alibi_slopes->stride(0);
  }
}

}  // namespace fastattn
