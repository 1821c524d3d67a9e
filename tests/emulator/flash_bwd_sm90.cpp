// Draws calls of the Hopper attention gradient and holds its results against a reference.
//
// One CTA does all tiles: if deterministic, they wait for each other, and here CTAs run one after the other.
#include "attention/flash_bwd_sm90.h"

#include "attention_call.h"

namespace {

using namespace emulator;
using fastattn::FlashBwdSm90Params;

template <typename T>
struct BackwardCall : AttentionCall<T> {
  Tensor<T> dout, rounded_out;
  std::vector<float> dlse;
  std::vector<double> dq, dk, dv;  // what is expected

  size_t lse_idx(int seq, int i, int head) const {
    return this->packed_q ? static_cast<size_t>(head) * this->num_tokens + this->query_token(seq, i)
                          : (static_cast<size_t>(seq) * this->num_heads + head) * this->q_lens[0] + i;
  }

  // What the forward gives, and the gradients of it.
  void compute_reference(bool has_dlse) {
    const int d = this->head_dim, dv_dim = this->v_head_dim, heads = this->num_heads, kv_heads = this->num_kv_heads;
    rounded_out = Tensor<T>(static_cast<size_t>(this->num_tokens) * heads * dv_dim);
    dout = Tensor<T>(rounded_out.data.size());
    dlse.assign(has_dlse ? this->lse.size() : 0, NAN);
    dq.assign(this->q.data.size(), 0.0);
    dk.assign(this->k.data.size(), 0.0);
    dv.assign(this->v.data.size(), 0.0);
    for (int seq = 0; seq < this->num_seqs; ++seq) {
      for (int i = 0; i < this->used_q(seq); ++i) {
        for (int head = 0; head < heads; ++head) add_row(seq, i, head, d, dv_dim, heads, kv_heads);
      }
    }
  }

  void add_row(int seq, int i, int head, int d, int dv_dim, int heads, int kv_heads) {
    const int num_keys = this->used_k(seq), position = i + num_keys - this->used_q(seq);
    const int begin = this->window_left >= 0 ? std::max(0, position - this->window_left) : 0;
    const int end = this->window_right >= 0 ? std::min(num_keys, position + this->window_right + 1) : num_keys;
    const size_t q_at = (this->query_token(seq, i) * heads + head) * d;
    const size_t out_at = (this->query_token(seq, i) * heads + head) * dv_dim;
    const auto key = [&](int j) { return this->key_tokens[seq][j] * kv_heads + head / this->group; };
    std::vector<double> p(std::max(0, end - begin)), slope(p.size());
    double largest = -INFINITY, sum = 0.0;
    for (int j = begin; j < end; ++j) {
      double score = dot(&this->q.values[q_at], &this->k.values[key(j) * d], d) * this->softmax_scale();
      double& own_slope = slope[j - begin] = 1.0;
      if (this->softcap > 0.0f) {
        const double tanh = std::tanh(score / this->softcap);
        score = this->softcap * tanh;
        own_slope = 1.0 - tanh * tanh;
      }
      if (this->has_alibi) score -= this->slopes[head] * std::abs(position - j);
      p[j - begin] = score;
      largest = std::max(largest, score);
    }
    for (double& x : p) sum += x = std::exp(x - largest);
    for (double& x : p) x /= sum;
    const size_t at_lse = lse_idx(seq, i, head);
    this->lse[at_lse] = sum > 0.0 ? static_cast<float>(largest + std::log(sum)) : -INFINITY;
    if (!dlse.empty()) dlse[at_lse] = normal();
    std::vector<double> o(dv_dim);
    for (int j = begin; j < end; ++j) add_scaled(o.data(), p[j - begin], &this->v.values[key(j) * dv_dim], dv_dim);
    for (int c = 0; c < dv_dim; ++c) {
      rounded_out.set(out_at + c, static_cast<float>(o[c]));
      dout.set(out_at + c, normal());
    }
    double delta = dot(&rounded_out.values[out_at], &dout.values[out_at], dv_dim);
    if (!dlse.empty()) delta -= dlse[at_lse];
    for (int j = begin; j < end; ++j) {
      const double dp = dot(&dout.values[out_at], &this->v.values[key(j) * dv_dim], dv_dim);
      add_scaled(&dv[key(j) * dv_dim], p[j - begin], &dout.values[out_at], dv_dim);
      const double ds = p[j - begin] * (dp - delta) * slope[j - begin] * this->softmax_scale();
      add_scaled(&dq[q_at], ds, &this->k.values[key(j) * d], d);
      add_scaled(&dk[key(j) * d], ds, &this->q.values[q_at], d);
    }
  }
};

template <typename T>
void require_near(const std::vector<T>& is, const std::vector<double>& expected, const char* what, int heads, int dim) {
  double largest = 0.0;
  for (double x : expected) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double found = static_cast<float>(is[i]);
    if (std::abs(found - expected[i]) <= TypeInfo<T>::kTolerance * (0.2 + largest)) continue;
    fail(std::string(what) + " of token " + std::to_string(i / dim / heads) + ", head " +
         std::to_string(i / dim % heads) + ", column " + std::to_string(i % dim) + " is " + std::to_string(found) +
         ", expected " + std::to_string(expected[i]));
  }
  for (size_t i = expected.size(); i < is.size(); ++i) {
    if (!std::isnan(static_cast<float>(is[i]))) fail(std::string("a write behind ") + what);
  }
}

template <typename T>
void run_call(int head_dim) {
  BackwardCall<T> call;
  const int num_seqs = pick({1, 2, 3, 5});
  call.num_kv_heads = between(1, 2);
  call.group = pick({1, 1, 2, 3});
  call.packed_q = call.packed_k = one_in(2);
  call.head_dim = head_dim - pick({0, 0, 8});
  call.v_head_dim = head_dim - pick({0, 0, 16});
  const int most_q = pick({1, 60, 64, 130, 260}), most_k = pick({1, 40, 128, 200, 389});
  const bool has_seqused_q = call.packed_q && one_in(3), has_seqused_k = call.packed_q && one_in(3);
  for (int seq = 0; seq < num_seqs; ++seq) {
    call.q_lens.push_back(call.packed_q ? pick({0, most_q, between(0, most_q)}) : most_q);
    call.k_lens.push_back(call.packed_q ? pick({0, most_k, between(0, most_k)}) : most_k);
    if (has_seqused_q) call.seqused_q.push_back(between(0, call.q_lens[seq]));
    if (has_seqused_k) call.seqused_k.push_back(between(0, call.k_lens[seq]));
  }
  call.draw_extras();
  call.has_sinks = call.growing_logits = false;
  call.make_tensors();
  const int num_keys = call.cu_seqlens_k.back();
  if (call.num_tokens == 0 || num_keys == 0) return;
  call.compute_reference(one_in(3));

  FlashBwdSm90Params p;
  constexpr size_t kBehind = 64;
  std::vector<T> dq(call.dq.size() + kBehind, T(NAN)), dk(call.dk.size() + kBehind, T(NAN)),
      dv(call.dv.size() + kBehind, T(NAN));
  p.q = call.q.data.data();
  p.k = call.k.data.data();
  p.v = call.v.data.data();
  p.out = call.rounded_out.data.data();
  p.dout = call.dout.data.data();
  p.lse = call.lse.data();
  p.dlse = call.dlse.empty() ? nullptr : call.dlse.data();
  p.dq = dq.data();
  p.dk = dk.data();
  p.dv = dv.data();
  p.q_tokens = call.packed_q ? call.num_tokens : call.q_lens[0];
  p.k_tokens = call.packed_q ? num_keys : call.k_lens[0];
  p.q_token_stride = int64_t{call.num_heads} * (p.q_head_stride = call.head_dim);
  p.k_token_stride = int64_t{call.num_kv_heads} * (p.k_head_stride = call.head_dim);
  p.v_token_stride = int64_t{call.num_kv_heads} * (p.v_head_stride = call.v_head_dim);
  p.out_token_stride = p.dout_token_stride =
      int64_t{call.num_heads} * (p.out_head_stride = p.dout_head_stride = call.v_head_dim);
  if (call.packed_q) {
    p.cu_seqlens_q = call.cu_seqlens_q.data();
    p.cu_seqlens_k = call.cu_seqlens_k.data();
  } else {
    p.q_batch_stride = p.q_tokens * p.q_token_stride;
    p.k_batch_stride = p.k_tokens * p.k_token_stride;
    p.v_batch_stride = p.k_tokens * p.v_token_stride;
    p.out_batch_stride = p.dout_batch_stride = p.q_tokens * p.out_token_stride;
  }
  if (has_seqused_q) p.seqused_q = call.seqused_q.data();
  if (has_seqused_k) p.seqused_k = call.seqused_k.data();
  if (call.has_alibi) p.alibi_slopes = call.slopes.data();
  p.num_seqs = num_seqs;
  p.num_heads = call.num_heads;
  p.num_kv_heads = call.num_kv_heads;
  p.head_dim = call.head_dim;
  p.v_head_dim = call.v_head_dim;
  p.softmax_scale = call.softmax_scale();
  p.softcap = call.softcap;
  p.window_left = call.window_left;
  p.window_right = call.window_right;
  p.dtype = TypeInfo<T>::kDType;

  fastattn::FlashBwdSm90Config& config = p.config;
  config = fastattn::flash_bwd_sm90_config({num_seqs, call.num_heads, call.num_kv_heads, head_dim, p.q_tokens,
                                            call.max_q_len(), call.max_k_len(), call.packed_q, call.causal, 1});
  // Sections as they come in larger calls.
  const int64_t num_pairs = int64_t{num_seqs} * call.num_kv_heads;
  config.order = fastattn::SectionOrder::make(num_pairs, config.num_n_tiles, between(1, 3), one_in(2), 1);
  config.heads_last = one_in(2);
  const auto floats = [](int64_t size) { return std::vector<float>(static_cast<size_t>(size), NAN); };
  const auto ints = [](int64_t size) { return std::vector<int32_t>(static_cast<size_t>(size), -7); };
  auto lse_log2 = floats(config.rows(p.num_heads)), delta = lse_log2;
  auto dq_sum = floats(config.rows(p.num_heads) * config.head_dim);
  auto turns = ints(2 * p.num_heads * config.blocks_of_head);
  int32_t tile_counter = -7;
  p.lse_log2 = lse_log2.data();
  p.delta = delta.data();
  p.dq_sum = dq_sum.data();
  p.tile_counter = &tile_counter;
  const bool deterministic = one_in(3);
  if (deterministic) p.turns = turns.data();
  current_call += ": " + call.text() + (call.dlse.empty() ? "" : " dlse") + (deterministic ? " deterministic" : "") +
                  "; " + std::to_string(config.num_tiles) + " tiles";
  if (flash_bwd_sm90(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  require_near(dk, call.dk, "dk", call.num_kv_heads, call.head_dim);
  require_near(dv, call.dv, "dv", call.num_kv_heads, call.v_head_dim);
  require_near(dq, call.dq, "dq", call.num_heads, call.head_dim);
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int head_dim) {
    const size_t num_choices = std::size(fastattn::kFlashBwdSm90HeadDims);
    if (head_dim == 0) head_dim = fastattn::kFlashBwdSm90HeadDims[seed % num_choices];
    one_in(2) ? run_call<__half>(head_dim) : run_call<__nv_bfloat16>(head_dim);
  });
}
