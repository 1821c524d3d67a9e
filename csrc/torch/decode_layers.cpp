#include "decoder/decode_layers_sm90.h"
#include "gemm/gemm_sm90.h"
#include "torch/checks.h"
#include "torch/gated_activation_call.h"

namespace fastattn {
namespace {

using Tensors = std::vector<Tensor>;

void decode_layers_op(Tensor residual, Tensors qkv, Tensors qkv_bias, Tensors q_norm, Tensors k_norm, Tensors out,
                      Tensors gate_up, Tensors down, const Tensor& cos_sin, const Tensor& positions,
                      const Tensor& slot_mapping, const Tensor& seqused_k, const Tensor& block_table, Tensors k_cache,
                      Tensors v_cache, const MaybeTensor& workspace, int64_t num_heads, const std::string& activation,
                      double softmax_scale, double norm_eps, double qk_norm_eps, const MaybeTensor& token_ids,
                      const MaybeTensor& drawn, const MaybeTensor& embedding, const MaybeTensor& final_norm,
                      const MaybeTensor& head, const MaybeTensor& logits, Tensors tile_scales, Tensors global_scales,
                      Tensors norms, int64_t tile_order) {
  const char* op = "decode_layers";
  const Checks checks(op, "residual", residual);
  checks.shape("residual", residual, {kAny, kAny}).dtype("residual", residual, kHalves);
  // What the kernel copies in bulk, or takes as words of 4 to 16 bytes.
  const auto packed = [&](const char* name, const Tensor& t) {
    checks.that(t.is_contiguous(), std::string(name) + " is not contiguous");
    checks.that(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0,
                std::string(name) + " begins at an address that is not a multiple of 16");
    return t.data_ptr();
  };
  packed("residual", residual);
  const std::initializer_list<ScalarType> same = {residual.scalar_type()};
  const int64_t num_tokens = residual.size(0), n = residual.size(1), num_layers = static_cast<int64_t>(qkv.size());
  checks.that(num_layers >= 1 && num_layers <= kDecodeMaxLayers, "there are no layers, or more than 128");
  checks.that(k_cache.size() == qkv.size() && v_cache.size() == qkv.size() && k_cache[0].dim() == 4,
              "k_cache and v_cache are not a (num_blocks, block_size, Hk, D) for each layer");
  const int64_t block_size = k_cache[0].size(1), num_kv_heads = k_cache[0].size(2), head_dim = k_cache[0].size(3);
  const auto sized = [&](const Tensors& list, bool optional) {
    return static_cast<int64_t>(list.size()) == num_layers || (optional && list.empty());
  };
  checks.that(sized(out, false) && sized(gate_up, false) && sized(down, false) && sized(qkv_bias, true) &&
                  sized(q_norm, true) && sized(k_norm, true),
              "a list has another length than qkv_weight");
  const bool in_tiles = !tile_scales.empty();
  const auto times = [&](const Tensors& list, int64_t of_layer) {
    return static_cast<int64_t>(list.size()) == (in_tiles ? of_layer * num_layers : 0);
  };
  checks.that(times(tile_scales, 4) && times(global_scales, 4) && times(norms, 2),
              "tile_scales and global_scales are not four for each layer, or norm_weights not two");
  checks.shape("positions", positions, {num_tokens}).dtype("positions", positions, {ScalarType::Int});
  checks.shape("slot_mapping", slot_mapping, {num_tokens}).dtype("slot_mapping", slot_mapping, {ScalarType::Int});
  checks.shape("seqused_k", seqused_k, {num_tokens}).dtype("seqused_k", seqused_k, {ScalarType::Int});
  checks.shape("block_table", block_table, {num_tokens, kAny}).dtype("block_table", block_table, {ScalarType::Int});
  checks.shape("cos_sin", cos_sin, {kAny, head_dim}).dtype("cos_sin", cos_sin, {ScalarType::Float});
  checks.that(cos_sin.is_contiguous(), "cos_sin is not contiguous");
  checks.that(workspace.has_value(), "workspace is None, expected one of decode_layers_workspace words on a GPU");
  checks.dtype("workspace", *workspace, {ScalarType::Int}).shape("workspace", *workspace, {kAny});

  const OnDeviceOf guard(residual);
  DecodeLayersParams p;
  const int64_t rows = (num_heads + 2 * num_kv_heads) * head_dim;
  std::vector<DecodeLayerTiles> tiles(in_tiles ? num_layers : 0);
  for (int64_t i = 0; i < num_layers; ++i) {
    const int64_t intermediate = in_tiles ? gate_up[i].size(0) * 8 : gate_up[i].size(0) / 2;
    const auto weight = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
      checks.shape(name, t, shape).dtype(name, t, same);
      return static_cast<const void*>(packed(name, t));
    };
    // Of so many rows and columns, in 16 bits, or the `which`-th of the layer in tiles.
    const auto matrix = [&](const char* name, const Tensor& t, int which, int64_t its_rows, int64_t columns) {
      if (!in_tiles) return weight(name, t, {its_rows, columns});
      checks.shape(name, t, {its_rows / 16, columns / 64, 512}).dtype(name, t, {ScalarType::Byte});
      const Tensor &scale = tile_scales[4 * i + which], &global = global_scales[4 * i + which];
      checks.shape("tile_scales", scale, {its_rows / 16, columns / 64, 64});
      checks.dtype("tile_scales", scale, {ScalarType::Byte});
      checks.shape("global_scales", global, {its_rows}).dtype("global_scales", global, {ScalarType::Float});
      tiles[i].scales[which] = static_cast<const uint8_t*>(packed("tile_scales", scale));
      tiles[i].global_scales[which] = static_cast<const float*>(packed("global_scales", global));
      return static_cast<const void*>(packed(name, t));
    };
    DecodeLayer& layer = p.layers[i];
    layer.qkv = matrix("qkv_weight", qkv[i], 0, rows, n);
    layer.out = matrix("out_weight", out[i], 1, n, num_heads * head_dim);
    layer.gate_up = matrix("gate_up_weight", gate_up[i], 2, 2 * (i == 0 ? intermediate : p.intermediate_size), n);
    layer.down = matrix("down_weight", down[i], 3, n, intermediate);
    if (in_tiles) {
      tiles[i].input_norm = weight("norm_weights", norms[2 * i], {n});
      tiles[i].mlp_norm = weight("norm_weights", norms[2 * i + 1], {n});
    }
    const std::initializer_list<int64_t> cache = {kAny, block_size, num_kv_heads, head_dim};
    layer.k_cache = const_cast<void*>(weight("k_cache", k_cache[i], cache));
    layer.v_cache = const_cast<void*>(weight("v_cache", v_cache[i], cache));
    if (!qkv_bias.empty()) layer.qkv_bias = weight("qkv_bias", qkv_bias[i], {rows});
    if (!q_norm.empty()) layer.q_norm = weight("q_norm_weight", q_norm[i], {head_dim});
    if (!k_norm.empty()) layer.k_norm = weight("k_norm_weight", k_norm[i], {head_dim});
    p.intermediate_size = static_cast<int32_t>(intermediate);
  }
  if (in_tiles) p.tiles = tiles.data();
  p.tiles_of_fours = tile_order == 8;
  p.residual = residual.data_ptr();
  p.cos_sin = data<float>(cos_sin);
  p.positions = data<int32_t>(positions);
  p.slot_mapping = data<int32_t>(slot_mapping);
  p.seqused_k = data<int32_t>(seqused_k);
  p.block_table = data<int32_t>(block_table);
  p.workspace = static_cast<uint32_t*>(workspace->data_ptr());
  p.workspace_words = workspace->numel();
  p.block_table_stride = block_table.stride(0);
  p.max_position = static_cast<int32_t>(cos_sin.size(0));
  p.num_layers = static_cast<int32_t>(num_layers);
  p.num_tokens = static_cast<int32_t>(num_tokens);
  p.hidden_size = static_cast<int32_t>(n);
  p.num_heads = static_cast<int32_t>(num_heads);
  p.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  p.head_dim = static_cast<int32_t>(head_dim);
  p.block_size = static_cast<int32_t>(block_size);
  p.num_sms = static_cast<int32_t>(num_sms_of(residual));
  p.softmax_scale = static_cast<float>(softmax_scale);
  p.norm_eps = static_cast<float>(norm_eps);
  p.qk_norm_eps = static_cast<float>(qk_norm_eps);
  p.dtype = dtype_of(residual);
  if (token_ids.has_value()) {
    checks.that(embedding.has_value() && final_norm.has_value() && head.has_value() && logits.has_value(),
                "token_ids comes without embedding, final_norm_weight, head_weight or logits");
    const int64_t vocab_size = head->size(0);
    const auto whole = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
      checks.shape(name, t, shape).dtype(name, t, same);
      return packed(name, t);
    };
    checks.shape("token_ids", *token_ids, {num_tokens}).dtype("token_ids", *token_ids, {ScalarType::Int});
    p.token_ids = data<int32_t>(*token_ids);
    p.embedding = whole("embedding", *embedding, {vocab_size, n});
    p.final_norm = whole("final_norm_weight", *final_norm, {n});
    p.head = whole("head_weight", *head, {vocab_size, n});
    p.logits = whole("logits", *logits, {num_tokens, vocab_size});
    p.vocab_size = static_cast<int32_t>(vocab_size);
    if (drawn.has_value()) {
      checks.shape("drawn", *drawn, {kAny}).dtype("drawn", *drawn, {ScalarType::Int});
      p.drawn = data<int32_t>(*drawn);
      p.num_drawn = static_cast<int32_t>(drawn->numel());
    }
  }
  GemmSm90Params gate;
  const Activation kind = activation_named(checks, activation);
  checks.that(kind != Activation::kGelu, "activation is 'gelu', expected 'silu' or 'gelu_tanh' on a GPU");
  kind == Activation::kSilu ? set_silu_gate(gate) : set_gelu_tanh_gate(gate);
  p.gate_linear = gate.gate_linear;
  p.gate_cubic = gate.gate_cubic;
  checks.that(capability_of(residual) == 90, "the GPU is not of compute capability 9.0");
  if (num_tokens == 0) return;
  check_launch(op, decode_layers_sm90(p, stream_of(residual)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) { m.impl("decode_layers", TORCH_BOX(&decode_layers_op)); }

}  // namespace fastattn
