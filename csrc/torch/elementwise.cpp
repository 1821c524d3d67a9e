#include "elementwise/embedding.h"
#include "elementwise/rope_kv_write.h"
#include "torch/checks.h"
#include "torch/gated_activation_call.h"

namespace fastattn {

Activation activation_named(const Checks& checks, const std::string& name) {
  checks.that(name == "silu" || name == "gelu_tanh" || name == "gelu",
              "activation is '" + name + "', expected 'silu', 'gelu_tanh' or 'gelu'");
  return name == "silu" ? Activation::kSilu : name == "gelu_tanh" ? Activation::kGeluTanh : Activation::kGelu;
}

void run_gated_activation(const char* op, const Tensor& x, Activation activation, bool interleaved, Tensor& out) {
  GatedActivationParams p;
  p.x = x.data_ptr();
  p.out = out.data_ptr();
  p.x_rows = rows_of(x);
  p.num_rows = num_rows_of(x);
  p.width = out.size(out.dim() - 1);
  p.activation = activation;
  p.interleaved = interleaved;
  p.dtype = dtype_of(x);
  check_launch(op, gated_activation(p, stream_of(x)));
}

namespace {

Tensor gated_activation_op(const Tensor& x, const std::string& activation) {
  const Checks checks("gated_activation", "x", x);
  checks.rows("x", x).dtype("x", x, kHalves);
  std::vector<int64_t> shape = shape_of(x);
  checks.that(shape.back() % 2 == 0,
              "x has a last dimension of " + std::to_string(shape.back()) + ", expected it even");
  const Activation kind = activation_named(checks, activation);
  shape.back() /= 2;
  Tensor out = empty(x, shape, x.scalar_type());
  if (x.numel() == 0) return out;

  const OnDeviceOf guard(x);
  run_gated_activation("gated_activation", x, kind, false, out);
  return out;
}

Tensor embedding_op(const Tensor& token_ids, const Tensor& weight, double scale, const MaybeTensor& drawn) {
  const Checks checks("embedding", "token_ids", token_ids);
  checks.shape("token_ids", token_ids, {kAny}).dtype("token_ids", token_ids, {ScalarType::Int});
  checks.shape("weight", weight, {kAny, kAny}).dtype("weight", weight, kHalves);
  if (drawn) checks.shape("drawn", *drawn, {kAny}).dtype("drawn", *drawn, {ScalarType::Int});
  Tensor out = empty(weight, {token_ids.size(0), weight.size(1)}, weight.scalar_type());
  if (out.numel() == 0) return out;

  const OnDeviceOf guard(weight);
  EmbeddingParams p;
  p.token_ids = data<int32_t>(token_ids);
  if (drawn) {
    p.drawn = data<int32_t>(*drawn);
    p.num_drawn = drawn->size(0);
  }
  p.weight = weight.data_ptr();
  p.out = out.data_ptr();
  p.weight_stride = weight.stride(0);
  p.num_tokens = token_ids.size(0);
  p.vocab_size = weight.size(0);
  p.width = weight.size(1);
  p.scale = static_cast<float>(scale);
  p.dtype = dtype_of(weight);
  check_launch("embedding", embedding(p, stream_of(weight)));
  return out;
}

void rope_kv_write_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin, const Tensor& positions,
                      const Tensor& slot_mapping, const Tensor& k_cache, const Tensor& v_cache,
                      const MaybeTensor& q_norm_weight, const MaybeTensor& k_norm_weight, const MaybeTensor& k_scale,
                      const MaybeTensor& v_scale, double norm_eps, bool interleaved, bool hadamard) {
  const Checks checks("rope_kv_write", "q", q);
  checks.shape("q", q, {kAny, kAny, kAny}).dtype("q", q, kHalves);
  const int64_t num_tokens = q.size(0);
  const int64_t head_dim = q.size(2);
  checks.shape("k", k, {num_tokens, kAny, head_dim}).dtype("k", k, {q.scalar_type()});
  const int64_t num_kv_heads = k.size(1);
  checks.shape("v", v, {num_tokens, num_kv_heads, head_dim}).dtype("v", v, {q.scalar_type()});
  checks.shape("cos_sin", cos_sin, {kAny, kAny}).dtype("cos_sin", cos_sin, {ScalarType::Float});
  checks.that(cos_sin.size(1) % 2 == 0 && cos_sin.size(1) <= head_dim,
              "cos_sin has rotary_dim " + std::to_string(cos_sin.size(1)) +
                  ", expected it even and at most D = " + std::to_string(head_dim));
  checks.shape("positions", positions, {num_tokens}).dtype("positions", positions, {ScalarType::Int});
  checks.shape("slot_mapping", slot_mapping, {num_tokens}).dtype("slot_mapping", slot_mapping, {ScalarType::Int});
  checks.caches(q, k_cache, v_cache, k_scale, v_scale);
  checks.that(k_cache.size(2) == num_kv_heads,
              "k_cache has " + std::to_string(k_cache.size(2)) + " KV heads, expected " + std::to_string(num_kv_heads));
  checks.that(k_cache.size(0) * k_cache.size(1) <= INT32_MAX, "k_cache has 2^31 slots or more");
  if (q_norm_weight) {
    checks.shape("q_norm_weight", *q_norm_weight, {head_dim}).dtype("q_norm_weight", *q_norm_weight, {q.scalar_type()});
  }
  if (k_norm_weight) {
    checks.shape("k_norm_weight", *k_norm_weight, {head_dim}).dtype("k_norm_weight", *k_norm_weight, {q.scalar_type()});
  }
  checks.that(!is_8bit(k_cache) || head_dim <= kMaxHeadDim8Bit,
              "q has D = " + std::to_string(head_dim) + ", expected at most " + std::to_string(kMaxHeadDim8Bit) +
                  " with caches of 8 bits");
  checks.that(!hadamard || is_8bit(k_cache), "hadamard is True, expected it with caches of float8_e4m3fn or int8 only");
  if (num_tokens == 0 || head_dim == 0 || q.size(1) + num_kv_heads == 0) return;

  const OnDeviceOf guard(q);
  RopeKvWriteParams p;
  p.q = q.data_ptr();
  p.k = k.data_ptr();
  p.v = v.data_ptr();
  p.cos_sin = data<float>(cos_sin);
  p.positions = data<int32_t>(positions);
  p.slot_mapping = data<int32_t>(slot_mapping);
  p.k_cache = k_cache.data_ptr();
  p.v_cache = v_cache.data_ptr();
  p.q_norm_weight = q_norm_weight ? q_norm_weight->data_ptr() : nullptr;
  p.k_norm_weight = k_norm_weight ? k_norm_weight->data_ptr() : nullptr;
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.k_block_stride = k_cache.stride(0);
  p.k_slot_stride = k_cache.stride(1);
  p.k_cache_head_stride = k_cache.stride(2);
  p.v_block_stride = v_cache.stride(0);
  p.v_slot_stride = v_cache.stride(1);
  p.v_cache_head_stride = v_cache.stride(2);
  p.k_scale = kv_scale_of(k_scale);
  p.v_scale = kv_scale_of(v_scale);
  p.scales_of_tokens = k_scale && k_scale->dim() == 3;
  p.cos_sin_stride = cos_sin.stride(0);
  p.num_tokens = num_tokens;
  p.num_heads = static_cast<int32_t>(q.size(1));
  p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.rotary_dim = static_cast<int32_t>(cos_sin.size(1));
  p.max_position = cos_sin.size(0);
  p.num_blocks = static_cast<int32_t>(k_cache.size(0));
  p.block_size = static_cast<int32_t>(k_cache.size(1) > 0 ? k_cache.size(1) : 1);
  p.norm_eps = static_cast<float>(norm_eps);
  p.interleaved = interleaved;
  p.hadamard = hadamard;
  p.dtype = dtype_of(q);
  p.cache_dtype = dtype_of(k_cache);
  check_launch("rope_kv_write", rope_kv_write(p, stream_of(q)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("gated_activation", TORCH_BOX(&gated_activation_op));
  m.impl("embedding", TORCH_BOX(&embedding_op));
  m.impl("rope_kv_write", TORCH_BOX(&rope_kv_write_op));
}

}  // namespace fastattn
