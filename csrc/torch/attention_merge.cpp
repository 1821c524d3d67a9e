#include "attention/merge_states.h"
#include "torch/checks.h"

namespace fastattn {
namespace {

// out (B, S, H, D) or (T, H, D), and its lse.
AttentionState state_of(const Tensor& out, const Tensor& lse) {
  const bool batched = out.dim() == 4;
  AttentionState state;
  state.out = out.data_ptr();
  state.lse = data<float>(lse);
  state.batch_stride = batched ? out.stride(0) : 0;
  state.row_stride = out.stride(batched);
  state.head_stride = out.stride(batched + 1);
  state.lse_batch_stride = batched ? lse.stride(0) : 0;
  state.lse_head_stride = lse.stride(batched);
  return state;
}

std::tuple<Tensor, Tensor> merge_attention_states_op(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                                     const Tensor& lse_b) {
  const char* const op = "merge_attention_states";
  const Checks checks(op, "out_a", out_a);
  const bool batched = out_a.dim() == 4;
  checks.that(batched || out_a.dim() == 3,
              "out_a has " + std::to_string(out_a.dim()) + " dimensions, expected (T, H, D) or (B, S, H, D)");
  const int64_t batch = batched ? out_a.size(0) : 1;
  const int64_t rows = out_a.size(batched);
  const int64_t heads = out_a.size(batched + 1);
  const int64_t head_dim = out_a.size(batched + 2);
  checks.dtype("out_a", out_a, kFloats).dtype("out_b", out_b, {out_a.scalar_type()});
  const auto check_side = [&](const char* out_name, const Tensor& out, const char* lse_name, const Tensor& lse) {
    if (batched) {
      checks.shape(out_name, out, {batch, rows, heads, head_dim}).shape(lse_name, lse, {batch, heads, rows});
    } else {
      checks.shape(out_name, out, {rows, heads, head_dim}).shape(lse_name, lse, {heads, rows});
    }
    checks.dtype(lse_name, lse, {ScalarType::Float});
  };
  check_side("out_a", out_a, "lse_a", lse_a);
  check_side("out_b", out_b, "lse_b", lse_b);
  checks.that(head_dim > 0, "out_a has no columns, expected D >= 1");
  Tensor out = empty(out_a, shape_of(out_a), out_a.scalar_type());
  Tensor lse = empty(lse_a, shape_of(lse_a), ScalarType::Float);
  if (out.numel() == 0) return {out, lse};

  const OnDeviceOf guard(out_a);
  MergeStatesParams p;
  p.a = state_of(out_a, lse_a);
  p.b = state_of(out_b, lse_b);
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.batch = batch;
  p.num_rows = rows;
  p.num_heads = static_cast<int32_t>(heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.dtype = dtype_of(out_a);
  check_launch(op, merge_states(p, stream_of(out_a)));
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states_op));
}

}  // namespace fastattn
