// Draws decoders of few layers, and steps of one to four sequences through all of them, with and without a head; what
// the kernel leaves is held against loops in fp64, and two launches, which share the workspace, against each other, bit
// by bit. What no key lies in is NaN. A row of padding may be anything, in the same bits. Of size 16 or 8 heads have
// 128 dims, and weights 4 bits, in tiles of that order.
#include <cmath>

#include "arch/e2m1.cuh"
#include "decoder/decode_layers_sm90.h"
#include "drawn_call.h"
#include "gemm/gemm_sm90.h"
#include "w4_tiles.h"

namespace {

using namespace emulator;
using fastattn::DecodeLayersParams;

constexpr float kEps = 1e-5f;

template <typename T>
double rounded(double x) {
  return static_cast<float>(T(static_cast<float>(x)));
}

// rows of so many columns, of about 1 / sqrt(columns) each times `scale`.
template <typename T>
Tensor<T> draw_matrix(int64_t rows, int64_t columns, float scale = 1.0f) {
  Tensor<T> matrix(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) matrix.set(i, normal() * scale / std::sqrt(static_cast<float>(columns)));
  return matrix;
}
template <typename T>
Tensor<T> draw_vector(int64_t size, float mean, float scale) {
  Tensor<T> vector(size);
  for (int64_t i = 0; i < size; ++i) vector.set(i, mean + scale * normal());
  return vector;
}

using Row = std::vector<double>;

template <typename T>
Row product(const std::vector<T>& weight, const Row& x) {
  Row out(weight.size() / x.size());
  for (size_t row = 0; row < out.size(); ++row) {
    for (size_t i = 0; i < x.size(); ++i) out[row] += weight[row * x.size() + i] * x[i];
  }
  return out;
}

double norm_factor(const double* x, size_t size) {
  double sum = 0;
  for (size_t i = 0; i < size; ++i) sum += x[i] * x[i];
  return 1.0 / std::sqrt(sum / static_cast<double>(size) + kEps);
}

// A matrix as the kernel reads it where it has 4 bits, and the numbers that this means.
struct Tiles {
  std::vector<uint32_t> codes;
  std::vector<uint8_t> scales;
  std::vector<float> global_scales;
  std::vector<double> values;
};
Tiles draw_tiles(int64_t rows, int64_t columns, int order, double scale = 1.0) {
  Tiles tiles;
  std::vector<uint8_t> codes(rows * columns), scales(rows * columns / 16);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(between(0, 15));
  for (uint8_t& bits : scales) bits = static_cast<uint8_t>(between(0x30, 0x40));  // 0.5 to 2
  for (int64_t row = 0; row < rows; ++row) {
    const float own = static_cast<float>(between(50, 100)) / 20.0f;
    tiles.global_scales.push_back(own * std::sqrt(static_cast<float>(columns)) / static_cast<float>(scale));
  }
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double step = fastattn::from_e4m3<float>(scales[i / 16]);
    tiles.values.push_back(e2m1_value(codes[i]) * step / tiles.global_scales[i / columns]);
  }
  tiles.codes = tiles_of(rows, columns, order, order == 16 ? fp4_word : fp8_word,
                         [&](int64_t n, int64_t k) { return codes[n * columns + k]; });
  tiles.scales = scale_tiles_of(rows, columns, 4, [&](int64_t n, int64_t g) { return scales[n * columns / 16 + g]; });
  return tiles;
}

template <typename T>
struct Layer {
  Tensor<T> qkv, qkv_bias, q_norm, k_norm, out, gate_up, down, k_cache, v_cache;
  Tiles tiles[4];  // of the four matrices, which are empty then
  Tensor<T> norms[2];
};

template <typename T>
struct Call {
  int head_dim, num_tokens, num_heads, num_kv_heads, group, num_sms, hidden, intermediate, block_size,
      num_blocks = 1, max_blocks, vocab = 0;
  int tile_order;  // 0: weights of T
  bool has_bias, has_head_norms, is_silu;
  std::vector<Layer<T>> layers;
  std::vector<int32_t> lengths, positions, slots, block_table, token_ids, drawn;
  std::vector<float> cos_sin;
  Tensor<T> embedding, final_norm, head;
  std::vector<T> residual, logits;
  std::vector<uint32_t> workspace;

  int64_t cache_size() const { return int64_t{num_blocks} * block_size * num_kv_heads * head_dim; }

  Call(int of_head_dim, int of_tile_order) : head_dim(of_head_dim), tile_order(of_tile_order) {
    num_sms = pick({between(2, kMaxCtas), kMaxCtas});  // of more than eight some have no rows of down
    // Short ones and some of several stages.
    intermediate = 64 * pick({1, 2, between(1, 8), one_in(3) ? between(17, 40) : 2});
    const int ctas = std::min(num_sms, intermediate / (tile_order != 0 ? 16 : 8));
    num_tokens = std::min(pick({1, 1, 2, 3, 4}), ctas);
    num_heads = between(1, ctas / num_tokens);
    group = 1;
    for (int g = 2; g <= fastattn::kDecodeMaxGroup; ++g) {
      if (num_heads % g == 0 && one_in(2)) group = g;
    }
    num_kv_heads = num_heads / group;
    hidden = 64 * pick({1, 1, 2, between(1, 2 * ctas), one_in(3) ? between(17, 40) : 1});
    hidden = std::min(hidden, intermediate > 1024 ? 512 : 128 * ctas);
    block_size = 1 << between(0, 6);
    has_bias = one_in(2), has_head_norms = one_in(2), is_silu = one_in(2);
    const int num_layers = between(1, 3);
    for (int i = 0; i < num_tokens; ++i) {
      lengths.push_back(pick({0, 1, between(1, 40), between(1, 300), one_in(3) ? between(300, 3000) : 2}));
    }
    int num_pages = 0, longest = 0;
    for (int length : lengths) {
      num_pages += (length + block_size - 1) / block_size;
      longest = std::max(longest, length);
    }
    num_blocks = num_pages + 1, max_blocks = (longest + block_size - 1) / block_size + 1;
    std::vector<int32_t> pages(num_blocks);
    for (int i = 0; i < num_blocks; ++i) pages[i] = i;
    std::shuffle(pages.begin(), pages.end(), draws);
    block_table.assign(num_tokens * max_blocks, 1 << 30);
    for (int token = 0, page = 0; token < num_tokens; ++token) {
      for (int i = 0; i * block_size < lengths[token]; ++i) block_table[token * max_blocks + i] = pages[page++];
      slots.push_back(lengths[token] > 0 ? slot_of(token, lengths[token] - 1) : -1);
      positions.push_back(std::max(lengths[token] - 1, 0));
    }
    cos_sin.resize(int64_t{longest + 1} * head_dim);
    for (int position = 0; position <= longest; ++position) {
      for (int i = 0; i < head_dim / 2; ++i) {
        const double angle = position * std::pow(10000.0, -2.0 * i / head_dim);
        cos_sin[position * head_dim + i] = static_cast<float>(std::cos(angle));
        cos_sin[position * head_dim + head_dim / 2 + i] = static_cast<float>(std::sin(angle));
      }
    }
    const int qkv_rows = (num_heads + 2 * num_kv_heads) * head_dim;
    for (int i = 0; i < num_layers; ++i) {
      Layer<T> layer;
      if (tile_order == 0) {
        layer.qkv = draw_matrix<T>(qkv_rows, hidden);
      } else {
        for (Tensor<T>& norm : layer.norms) norm = draw_vector<T>(hidden, 1.0f, 0.3f);
        layer.tiles[0] = draw_tiles(qkv_rows, hidden, tile_order);
        layer.tiles[1] = draw_tiles(hidden, num_heads * head_dim, tile_order, 0.5);
        layer.tiles[2] = draw_tiles(2 * intermediate, hidden, tile_order);
        layer.tiles[3] = draw_tiles(hidden, intermediate, tile_order);
      }
      if (has_bias) layer.qkv_bias = draw_vector<T>(qkv_rows, 0.0f, 0.3f);
      if (has_head_norms) layer.q_norm = draw_vector<T>(head_dim, 1.0f, 0.3f);
      if (has_head_norms) layer.k_norm = draw_vector<T>(head_dim, 1.0f, 0.3f);
      if (tile_order == 0) {
        layer.out = draw_matrix<T>(hidden, num_heads * head_dim, 0.5f);
        layer.gate_up = draw_matrix<T>(2 * intermediate, hidden);
        layer.down = draw_matrix<T>(hidden, intermediate);
      }
      for (Tensor<T>* cache : {&layer.k_cache, &layer.v_cache}) {
        *cache = Tensor<T>(cache_size());
        for (int token = 0; token < num_tokens; ++token) {
          for (int key = 0; key + 1 < lengths[token]; ++key) {
            for (int j = 0; j < num_kv_heads * head_dim; ++j) {
              cache->set(int64_t{slot_of(token, key)} * num_kv_heads * head_dim + j, normal());
            }
          }
        }
      }
      layers.push_back(std::move(layer));
    }
    residual.resize(int64_t{num_tokens} * hidden);
    for (T& value : residual) value = T(normal());
    if (one_in(2)) draw_head();
    const int64_t rows = qkv_rows + num_heads * head_dim + 2 * hidden + intermediate;
    const int64_t partial = int64_t{num_heads} * 32 * (head_dim / 2 + 1) * 4;
    workspace.assign(4 + fastattn::kDecodeMaxTokens * (rows + partial), 0);
    workspace[0] = pick<uint32_t>({0, 0, 1 << 20});
  }

  int slot_of(int token, int key) const {
    return block_table[token * max_blocks + key / block_size] * block_size + key % block_size;
  }

  void draw_head() {
    vocab = 8 * pick({1, between(1, 8), between(1, 60)});
    embedding = draw_vector<T>(int64_t{vocab} * hidden, 0.0f, 1.0f);
    head = draw_matrix<T>(vocab, hidden);
    final_norm = draw_vector<T>(hidden, 1.0f, 0.3f);
    logits.assign(int64_t{num_tokens} * vocab, T(NAN));
    for (int i = 0; i < 3; ++i) drawn.push_back(pick({between(0, vocab - 1), between(0, vocab - 1), -1, vocab}));
    for (int i = 0; i < num_tokens; ++i) {
      token_ids.push_back(pick({between(0, vocab - 1), between(0, vocab - 1), -between(1, 3), -4, vocab}));
    }
  }

  std::string text() const {
    std::string of_lengths;
    for (int length : lengths) of_lengths += " " + std::to_string(length);
    return ": " + std::to_string(layers.size()) + " layers of " + std::to_string(hidden) + " and " +
           std::to_string(intermediate) + ", " + std::to_string(num_heads) + " heads of " + std::to_string(head_dim) +
           ", " + std::to_string(num_kv_heads) + " KV heads, " + TypeInfo<T>::kName + ", " + std::to_string(num_sms) +
           " SMs, keys" + of_lengths + ", " + std::to_string(vocab) + " logits" +
           (tile_order != 0 ? ", tiles in order " + std::to_string(tile_order) : "");
  }

  void run() {
    DecodeLayersParams p;
    std::vector<fastattn::DecodeLayerTiles> tiles(layers.size());
    for (size_t i = 0; i < layers.size(); ++i) {
      Layer<T>& layer = layers[i];
      p.layers[i] = {layer.qkv.data.data(),
                     has_bias ? layer.qkv_bias.data.data() : nullptr,
                     has_head_norms ? layer.q_norm.data.data() : nullptr,
                     has_head_norms ? layer.k_norm.data.data() : nullptr,
                     layer.out.data.data(),
                     layer.gate_up.data.data(),
                     layer.down.data.data(),
                     layer.k_cache.data.data(),
                     layer.v_cache.data.data()};
      if (tile_order == 0) continue;
      for (int j = 0; j < 4; ++j) {
        tiles[i].scales[j] = layer.tiles[j].scales.data();
        tiles[i].global_scales[j] = layer.tiles[j].global_scales.data();
      }
      p.layers[i].qkv = layer.tiles[0].codes.data();
      p.layers[i].out = layer.tiles[1].codes.data();
      p.layers[i].gate_up = layer.tiles[2].codes.data();
      p.layers[i].down = layer.tiles[3].codes.data();
      tiles[i].input_norm = layer.norms[0].data.data();
      tiles[i].mlp_norm = layer.norms[1].data.data();
    }
    if (tile_order != 0) p.tiles = tiles.data();
    p.tiles_of_fours = tile_order == 8;
    p.residual = residual.data();
    p.cos_sin = cos_sin.data();
    p.positions = positions.data();
    p.slot_mapping = slots.data();
    p.seqused_k = lengths.data();
    p.block_table = block_table.data();
    p.workspace = workspace.data();
    if (vocab > 0) {
      p.token_ids = token_ids.data();
      p.drawn = drawn.data();
      p.num_drawn = static_cast<int32_t>(drawn.size());
      p.embedding = embedding.data.data();
      p.final_norm = final_norm.data.data();
      p.head = head.data.data();
      p.logits = logits.data();
      p.vocab_size = vocab;
    }
    p.block_table_stride = max_blocks;
    p.workspace_words = static_cast<int64_t>(workspace.size());
    p.max_position = static_cast<int32_t>(cos_sin.size() / head_dim);
    p.num_layers = static_cast<int32_t>(layers.size());
    p.num_tokens = num_tokens;
    p.hidden_size = hidden;
    p.intermediate_size = intermediate;
    p.num_heads = num_heads;
    p.num_kv_heads = num_kv_heads;
    p.head_dim = head_dim;
    p.block_size = block_size;
    p.num_sms = num_sms;
    p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    p.norm_eps = p.qk_norm_eps = kEps;
    fastattn::GemmSm90Params gate;
    is_silu ? set_silu_gate(gate) : set_gelu_tanh_gate(gate);
    p.gate_linear = gate.gate_linear;
    p.gate_cubic = gate.gate_cubic;
    p.dtype = TypeInfo<T>::kDType;
    if (decode_layers_sm90(p, nullptr) != cudaSuccess) fail("the call is refused");
  }

  // ------------------------------------------------------------------------------------------ what it should be

  // A head, in its place in qkv: normalized and turned if it is of q or k.
  void turn(int token, double* values, const Tensor<T>& norm) const {
    if (has_head_norms) {
      const double factor = norm_factor(values, head_dim);
      for (int i = 0; i < head_dim; ++i) values[i] = rounded<T>(values[i] * factor * norm.values[i]);
    }
    const float* const angles = &cos_sin[int64_t{positions[token]} * head_dim];
    for (int i = 0; i < head_dim / 2; ++i) {
      const double a = values[i], b = values[i + head_dim / 2];
      values[i] = rounded<T>(a * angles[i] - b * angles[i + head_dim / 2]);
      values[i + head_dim / 2] = rounded<T>(b * angles[i] + a * angles[i + head_dim / 2]);
    }
  }

  // Of the layer's caches as they were, and q, and the new key and value behind it.
  Row attention(const Layer<T>& layer, int token, const Row& qkv) const {
    Row out(num_heads * head_dim);
    for (int h = 0; h < num_heads; ++h) {
      const int kv_head = h / group;
      const auto at = [&](const Tensor<T>& cache, int first_head, int key, int i) -> double {
        if (key == lengths[token] - 1) return qkv[(first_head + kv_head) * head_dim + i];
        return cache.values[(int64_t{slot_of(token, key)} * num_kv_heads + kv_head) * head_dim + i];
      };
      Row scores(lengths[token]);
      double most = -INFINITY, sum = 0;
      for (int key = 0; key < lengths[token]; ++key) {
        for (int i = 0; i < head_dim; ++i) scores[key] += qkv[h * head_dim + i] * at(layer.k_cache, num_heads, key, i);
        scores[key] /= std::sqrt(static_cast<double>(head_dim));
        most = std::max(most, scores[key]);
      }
      for (double& score : scores) sum += score = std::exp(score - most);
      for (int i = 0; i < head_dim; ++i) {
        double& total = out[h * head_dim + i];
        for (int key = 0; key < lengths[token]; ++key) {
          total += scores[key] / sum * at(layer.v_cache, num_heads + num_kv_heads, key, i);
        }
        total = rounded<T>(total);
      }
    }
    return out;
  }

  double gated(double gate, double up) const {
    const double inner = is_silu ? gate : 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate);
    return rounded<T>(gate / (1.0 + std::exp(-inner)) * up);
  }

  Row begin_of(int token) const {
    Row h(hidden);
    int id = vocab > 0 ? token_ids[token] : 0;
    if (id < 0 && id >= -static_cast<int>(drawn.size())) id = drawn[-1 - id];
    for (int i = 0; i < hidden; ++i) {
      if (vocab == 0) h[i] = static_cast<float>(residual[int64_t{token} * hidden + i]);
      if (vocab > 0 && id >= 0 && id < vocab) h[i] = embedding.values[int64_t{id} * hidden + i];
    }
    return h;
  }

  // One of a layer's products, by its place among them; its norm's weight, if there is one, is rounded into x.
  Row product_of(const Layer<T>& layer, int which, Row x) const {
    const Tensor<T>* const weights[4] = {&layer.qkv, &layer.out, &layer.gate_up, &layer.down};
    if (tile_order == 0) return product(weights[which]->values, x);
    for (size_t i = 0; which % 2 == 0 && i < x.size(); ++i) x[i] = rounded<T>(x[i] * layer.norms[which / 2].values[i]);
    return product(layer.tiles[which].values, x);
  }

  // The stream behind all layers; keys and values that are to be kept, of each layer, (2, Hk D).
  Row stream(int token, std::vector<Row>& kept) const {
    Row h = begin_of(token);
    for (const Layer<T>& layer : layers) {
      Row qkv = product_of(layer, 0, h);
      const double factor = norm_factor(h.data(), hidden);
      for (size_t i = 0; i < qkv.size(); ++i) {
        qkv[i] = rounded<T>(qkv[i] * factor + (has_bias ? layer.qkv_bias.values[i] : 0.0f));
      }
      for (int head = 0; head < num_heads + num_kv_heads; ++head) {
        turn(token, &qkv[head * head_dim], head < num_heads ? layer.q_norm : layer.k_norm);
      }
      kept.emplace_back(qkv.begin() + num_heads * head_dim, qkv.end());
      const Row of_out = product_of(layer, 1, attention(layer, token, qkv));
      for (int i = 0; i < hidden; ++i) h[i] = rounded<T>(h[i] + of_out[i]);
      const Row both = product_of(layer, 2, h);
      const double second = norm_factor(h.data(), hidden);
      Row x(intermediate);
      for (int i = 0; i < intermediate; ++i) {
        const int gate = tile_order != 0 ? i : i / 8 * 16 + i % 8, up = gate + (tile_order != 0 ? intermediate : 8);
        x[i] = gated(both[gate] * second, both[up] * second);
      }
      const Row of_down = product_of(layer, 3, x);
      for (int i = 0; i < hidden; ++i) h[i] = rounded<T>(h[i] + of_down[i]);
    }
    return h;
  }
};

template <typename T>
void expect(const char* name, int token, int64_t at, double got, double expected) {
  const double allowed = 4 * TypeInfo<T>::kTolerance * std::max(1.0, std::abs(expected));
  if (std::abs(got - expected) <= allowed) return;
  fail(std::string(name) + "[" + std::to_string(token) + ", " + std::to_string(at) + "] is " + std::to_string(got) +
       ", expected " + std::to_string(expected));
}

template <typename T>
void expect_same(const std::vector<T>& a, const std::vector<T>& b, const char* name) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) != 0) fail(std::string("two runs differ in ") + name);
}

template <typename T>
void run_call(int head_dim, int tile_order = 0) {
  Call<T> call(head_dim, tile_order);
  current_call += call.text();
  const Call<T> before = call;
  call.run();
  for (int token = 0; token < call.num_tokens; ++token) {
    if (call.lengths[token] == 0) continue;
    std::vector<Row> kept;
    Row h = before.stream(token, kept);
    for (int i = 0; i < call.hidden; ++i) {
      expect<T>("residual", token, i, static_cast<float>(call.residual[int64_t{token} * call.hidden + i]), h[i]);
    }
    const int width = call.num_kv_heads * head_dim;
    for (size_t layer = 0; layer < kept.size(); ++layer) {
      for (int i = 0; i < width; ++i) {
        const int64_t at = int64_t{call.slots[token]} * width + i;
        expect<T>("k_cache", token, at, static_cast<float>(call.layers[layer].k_cache.data[at]), kept[layer][i]);
        expect<T>("v_cache", token, at, static_cast<float>(call.layers[layer].v_cache.data[at]),
                  kept[layer][width + i]);
        call.layers[layer].k_cache.data[at] = before.layers[layer].k_cache.data[at];
        call.layers[layer].v_cache.data[at] = before.layers[layer].v_cache.data[at];
      }
    }
    if (call.vocab == 0) continue;
    const double factor = norm_factor(h.data(), call.hidden);
    for (int i = 0; i < call.hidden; ++i) h[i] = rounded<T>(h[i] * factor * call.final_norm.values[i]);
    const Row logits = product(call.head.values, h);
    for (int i = 0; i < call.vocab; ++i) {
      expect<T>("logits", token, i, static_cast<float>(call.logits[int64_t{token} * call.vocab + i]), logits[i]);
    }
  }
  for (size_t layer = 0; layer < call.layers.size(); ++layer) {  // nothing else was written
    expect_same(call.layers[layer].k_cache.data, before.layers[layer].k_cache.data, "k_cache");
    expect_same(call.layers[layer].v_cache.data, before.layers[layer].v_cache.data, "v_cache");
  }
  Call<T> again = before;
  again.workspace = call.workspace;
  again.run();
  expect_same(again.residual, call.residual, "residual");
  expect_same(again.logits, call.logits, "logits");
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int, int size) {
    const int head_dim = size != 0 ? size : pick({64, 128, 8, 16});
    if (head_dim <= 16) return run_call<__nv_bfloat16>(128, head_dim);
    one_in(2) ? run_call<__half>(head_dim) : run_call<__nv_bfloat16>(head_dim);
  });
}
