// A drawn call of attention: its tensors, with NaN wherever no kernel may look, and what must come out.
#pragma once

#include <climits>
#include <numeric>

#include "drawn_call.h"

namespace emulator {

// ---------------------------------------------------------------------------------------------
// K and V of type KV: T, or 8 bits where the kernel multiplies them by k_scale and v_scale.
template <typename T, typename KV = T>
struct AttentionCall {
  using Out = typename TypeInfo<T>::Out;

  // ---- set by who draws it
  int num_kv_heads = 1, group = 1, head_dim = 0, v_head_dim = 0;
  std::vector<int> q_lens, k_lens;        // of a batch all are the same
  std::vector<int> seqused_q, seqused_k;  // empty: not given; seqused_k may be more than there are
  bool packed_q = false, packed_k = false;
  int page_size = 0;  // 0: not paged
  bool causal = false;
  int window_left = -1, window_right = -1;
  float softcap = 0.0f;
  bool has_alibi = false, has_sinks = false, has_descales = false;
  bool has_scales = false, scales_of_tokens = false;  // of K and V, paged only
  bool scales_fall = false;                           // those of V, from token to token: else they grow, mostly
  bool has_tree = false;                              // paged and causal only
  bool in_e4m3 = false;                               // out, paged only
  bool growing_logits = false;                        // so that the reference of the exponentials must move often

  // ---- made by make_tensors
  int num_seqs, num_heads, num_tokens, max_blocks = 0, num_pages = 0;
  std::vector<int> cu_seqlens_q, cu_seqlens_k, block_table;
  std::vector<std::vector<size_t>> key_tokens;  // where a sequence's keys lie
  Tensor<T> q;
  Tensor<KV> k, v;
  std::vector<float> slopes, sinks, q_descale, k_descale, v_descale;
  std::vector<int64_t> tree_mask;
  std::vector<float> k_scale, v_scale;  // (Hk), or (tokens of all pages, Hk), NaN where no sequence has a key
  std::vector<Out> out;                 // and what lies behind it; of e4m3 only the first half of it is
  float out_scale = 1.0f;
  std::vector<float> lse;
  static constexpr size_t kBehind = 64;

  float softmax_scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
  int max_q_len() const { return *std::max_element(q_lens.begin(), q_lens.end()); }
  int max_k_len() const { return *std::max_element(k_lens.begin(), k_lens.end()); }
  int used_q(int seq) const { return seqused_q.empty() ? q_lens[seq] : seqused_q[seq]; }
  int used_k(int seq) const { return seqused_k.empty() ? k_lens[seq] : std::min(seqused_k[seq], k_lens[seq]); }
  size_t query_token(int seq, int i) const { return static_cast<size_t>(cu_seqlens_q[seq] + i); }

  void draw_extras() {
    causal = one_in(2);
    window_left = pick({-1, -1, -1, 17, 150});
    window_right = pick({-1, -1, 5});
    if (one_in(4)) softcap = 15.0f;
    has_alibi = one_in(4);
    has_sinks = one_in(3);
    in_e4m3 = page_size > 0 && one_in(4);
    growing_logits = one_in(4);
    if (has_tree) causal = true, window_left = pick({-1, 0, 2, 17, 150});
    if (causal) window_right = 0;
  }

  void make_tensors() {
    num_seqs = static_cast<int>(q_lens.size());
    num_heads = num_kv_heads * group;
    cu_seqlens_q.assign(1, 0);
    cu_seqlens_k.assign(1, 0);
    std::partial_sum(q_lens.begin(), q_lens.end(), std::back_inserter(cu_seqlens_q));
    std::partial_sum(k_lens.begin(), k_lens.end(), std::back_inserter(cu_seqlens_k));
    num_tokens = cu_seqlens_q.back();
    place_keys();

    const size_t num_key_tokens =
        page_size > 0 ? static_cast<size_t>(num_pages) * page_size : static_cast<size_t>(cu_seqlens_k.back());
    q = Tensor<T>(static_cast<size_t>(num_tokens) * num_heads * head_dim);
    k = Tensor<KV>(num_key_tokens * num_kv_heads * head_dim);
    v = Tensor<KV>(num_key_tokens * num_kv_heads * v_head_dim);
    for (size_t i = 0; i < q.data.size(); ++i) q.set(i, normal() * (growing_logits ? 6.0f : 1.0f));
    for (std::vector<float>* scale : {&k_scale, &v_scale}) {
      if (has_scales) scale->assign(scales_of_tokens ? num_key_tokens * num_kv_heads : num_kv_heads, NAN);
      for (float& factor : *scale) factor = scales_of_tokens ? NAN : 0.03f * static_cast<float>(between(1, 3));
    }
    for (int seq = 0; seq < num_seqs; ++seq) {
      for (int j = 0; j < used_k(seq); ++j) {
        const size_t row = key_tokens[seq][j] * num_kv_heads;
        for (size_t head = row; scales_of_tokens && head < row + num_kv_heads; ++head) {
          k_scale[head] = 0.01f * static_cast<float>(between(1, 9));
          const int growth = std::min(j / 24, 8);
          v_scale[head] = std::ldexp(1.0f, (scales_fall ? 8 - growth : growth) - between(9, 12));
        }
        const float size = (growing_logits ? static_cast<float>(j) / 60.0f : 1.0f) * (has_scales ? 20.0f : 1.0f);
        for (size_t i = row * head_dim; i < (row + num_kv_heads) * head_dim; ++i) k.set(i, normal() * size);
        for (size_t i = row * v_head_dim; i < (row + num_kv_heads) * v_head_dim; ++i) {
          v.set(i, normal() * (has_scales ? 20.0f : 1.0f));
        }
      }
    }
    if (has_alibi) slopes.resize(num_heads);
    if (has_sinks) sinks.resize(num_heads);
    for (float& slope : slopes) slope = 0.05f * static_cast<float>(between(0, 4));
    for (float& sink : sinks) sink = normal();
    for (std::vector<float>* descale : {&q_descale, &k_descale, &v_descale}) {
      descale->resize(num_seqs * num_kv_heads, 1.0f);
      for (float& factor : *descale) factor = has_descales ? pick({0.0f, 0.5f, 0.75f, 1.0f, 1.25f}) : 1.0f;
    }
    if (has_tree) draw_trees();
    if (in_e4m3) out_scale = pick({0.002f, 0.01f, 0.3f});  // the first cuts much to 448
    clear_results();
  }

  void clear_results() {
    out.assign(static_cast<size_t>(num_tokens) * num_heads * v_head_dim + kBehind, Out(NAN));
    lse.assign(static_cast<size_t>(num_tokens) * num_heads + kBehind, NAN);
  }

  // What the parameters of all attention kernels have in common.
  template <typename Params>
  void fill(Params& p) {
    p.q = q.data.data();
    p.k = k.data.data();
    p.v = v.data.data();
    p.out = out.data();
    p.lse = lse.data();
    if (packed_q) p.cu_seqlens_q = cu_seqlens_q.data();
    if (packed_k) p.cu_seqlens_k = cu_seqlens_k.data();
    if (!seqused_q.empty()) p.seqused_q = seqused_q.data();
    if (!seqused_k.empty()) p.seqused_k = seqused_k.data();
    if (page_size > 0) {
      p.block_table = block_table.data();
      p.block_table_stride = p.max_blocks = max_blocks;
    }
    if (has_alibi) p.alibi_slopes = slopes.data();
    if (has_sinks) p.sinks = sinks.data();
    if (in_e4m3) p.out_scale = &out_scale;
    fill_tree(p, 0);
    p.q_token_stride = int64_t{num_heads} * (p.q_head_stride = head_dim);
    p.k_token_stride = int64_t{num_kv_heads} * (p.k_head_stride = head_dim);
    p.v_token_stride = int64_t{num_kv_heads} * (p.v_head_stride = v_head_dim);
    p.num_tokens = num_tokens;
    p.num_seqs = num_seqs;
    p.num_heads = num_heads;
    p.num_kv_heads = num_kv_heads;
    p.head_dim = head_dim;
    p.v_head_dim = v_head_dim;
    p.softmax_scale = softmax_scale();
    p.softcap = softcap;
    p.window_left = window_left;
    p.window_right = window_right;
    p.dtype = TypeInfo<T>::kDType;
  }

  // Those of the kernels on mma.sync.
  template <typename Params>
  void fill_portable(Params& p) {
    fill(p);
    if (!packed_q) {
      p.batch_q_len = q_lens[0];
      p.batch_k_len = k_lens[0];
      p.q_batch_stride = p.batch_q_len * p.q_token_stride;
      p.k_batch_stride = p.batch_k_len * p.k_token_stride;
      p.v_batch_stride = p.batch_k_len * p.v_token_stride;
    }
    if (page_size > 0) {
      p.paged = true;
      p.block_size = page_size;
      p.num_blocks = num_pages;
      p.k_block_stride = p.block_size * p.k_token_stride;
      p.v_block_stride = p.block_size * p.v_token_stride;
    }
  }

  // Holds every row of the results against a reference in double.
  // Sequences with other numbers of query tokens are another kernel's.
  void check(int min_q_len = 0, int max_q_len = INT_MAX) const {
    for (int seq = 0; seq < num_seqs; ++seq) {
      if (q_lens[seq] < min_q_len || q_lens[seq] > max_q_len) continue;
      for (int i = 0; i < q_lens[seq]; ++i) {
        for (int head = 0; head < num_heads; ++head) check_row(seq, i, head);
      }
    }
    const auto check_behind = [](const auto& results, size_t size) {
      for (size_t i = size; i < results.size(); ++i) {
        if (!std::isnan(static_cast<float>(results[i]))) fail("a write behind the results");
      }
    };
    check_behind(out, (out.size() - kBehind) / (in_e4m3 ? 2 : 1));
    check_behind(lse, lse.size() - kBehind);
  }

  // Another run, on the workspace as the first has left it, gives the same bits.
  template <typename Launch>
  void check_again(const Launch& launch) {
    const auto first_out = out;
    const auto first_lse = lse;
    clear_results();
    launch();
    if (std::memcmp(first_out.data(), out.data(), first_out.size() * sizeof(first_out[0])) != 0 ||
        std::memcmp(first_lse.data(), lse.data(), first_lse.size() * sizeof(float)) != 0) {
      fail("two runs differ");
    }
  }

  std::string text() const {
    const auto list = [](const char* name, const std::vector<int>& values) {
      std::string all = std::string(" ") + name + "=[";
      for (int value : values) all += std::to_string(value) + " ";
      if (!values.empty()) all.pop_back();
      return values.empty() ? std::string() : all + "]";
    };
    std::string all = std::string(TypeInfo<T>::kName) + " D=" + std::to_string(head_dim) +
                      " Dv=" + std::to_string(v_head_dim) + " Hk=" + std::to_string(num_kv_heads) +
                      " G=" + std::to_string(group) + list("q_lens", q_lens) + list("k_lens", k_lens) +
                      list("seqused_q", seqused_q) + list("seqused_k", seqused_k);
    if (packed_q) all += " packed_q";
    if (packed_k) all += " packed_k";
    if (page_size > 0) all += " page_size=" + std::to_string(page_size);
    if (causal) all += " causal";
    all += " window=" + std::to_string(window_left) + "," + std::to_string(window_right);
    if (softcap > 0.0f) all += " softcap";
    if (has_alibi) all += " alibi";
    if (has_sinks) all += " sinks";
    if (has_tree) all += " tree";
    if (has_descales) all += " descales";
    if (in_e4m3) all += " out_scale=" + std::to_string(out_scale);
    if (sizeof(KV) < sizeof(T)) all += std::string(" kv=") + TypeInfo<KV>::kName;
    if (has_scales) all += scales_of_tokens ? " scales of tokens" : " scales of heads";
    if (growing_logits) all += " growing_logits";
    return all;
  }

 private:
  // Of those parameters that have it.
  template <typename Params>
  auto fill_tree(Params& p, int) -> decltype(p.tree_mask, void()) {
    if (has_tree) p.tree_mask = tree_mask.data();
  }
  template <typename Params>
  void fill_tree(Params&, long) {}

  // Each token's parent is one before it, or none. Bits that say nothing are garbage: of the token itself and behind
  // it, and all those of sequences that are too long.
  void draw_trees() {
    const int most_back = pick({1, 3, 64});
    for (int seq = 0; seq < num_seqs; ++seq) {
      for (int i = 0; i < q_lens[seq]; ++i) {
        const int parent = i - between(1, most_back);
        const uint64_t garbage = i < 64 ? (uint64_t{draws()} << 32 | draws()) << i : draws();
        tree_mask.push_back(static_cast<int64_t>(garbage | (i < 64 && parent >= 0 ? path_of(seq, parent) : 0)));
      }
    }
  }
  // Of a tree's token: itself and its ancestors.
  uint64_t path_of(int seq, int i) const {
    const uint64_t own = uint64_t{1} << i;
    return (static_cast<uint64_t>(tree_mask[query_token(seq, i)]) & (own - 1)) | own;
  }
  // How far before token i its key j is, in steps from key to key that it sees; -1 if it does not see it.
  int distance(int seq, int i, int j) const {
    const int first = used_k(seq) - used_q(seq);
    if (!has_tree || used_q(seq) > 64) return first + i - j;
    const auto seen = [&](int key) {
      return key < first || (key - first <= i && path_of(seq, i) >> (key - first) & 1);
    };
    int steps = 0;
    for (int key = j + 1; key <= first + i; ++key) steps += seen(key);
    return seen(j) ? steps : -1;
  }

  // Pages are dealt at random; entries of the table that no key needs hold garbage.
  void place_keys() {
    key_tokens.resize(num_seqs);
    std::vector<int> pages;
    const auto num_blocks = [&](int seq) { return (k_lens[seq] + page_size - 1) / page_size; };
    if (page_size > 0) {
      max_blocks = (max_k_len() + page_size - 1) / page_size + 2;
      num_pages = 2;
      for (int seq = 0; seq < num_seqs; ++seq) num_pages += num_blocks(seq);
      block_table.resize(static_cast<size_t>(num_seqs) * max_blocks);
      for (int& entry : block_table) entry = static_cast<int>(draws());
      pages.resize(num_pages);
      std::iota(pages.begin(), pages.end(), 0);
      std::shuffle(pages.begin(), pages.end(), draws);
    }
    for (int seq = 0; seq < num_seqs; ++seq) {
      int* const table = block_table.data() + static_cast<size_t>(seq) * max_blocks;
      for (int block = 0; page_size > 0 && block < num_blocks(seq); ++block) {
        table[block] = pages.back();
        pages.pop_back();
      }
      for (int j = 0; j < k_lens[seq]; ++j) {
        const int token = page_size > 0 ? table[j / page_size] * page_size + j % page_size : cu_seqlens_k[seq] + j;
        key_tokens[seq].push_back(static_cast<size_t>(token));
      }
    }
  }

  void check_row(int seq, int i, int head) const {
    const int kv_head = head / group;
    const bool counts = i < used_q(seq);
    std::vector<int> keys, distances;
    for (int j = 0; counts && j < used_k(seq); ++j) {
      const int steps = distance(seq, i, j);
      if ((window_left >= 0 && steps > window_left) || (window_right >= 0 && -steps > window_right)) continue;
      keys.push_back(j);
      distances.push_back(std::abs(steps));
    }
    const float* const q_row = &q.values[(query_token(seq, i) * num_heads + head) * head_dim];
    const int descale_idx = seq * num_kv_heads + kv_head;
    const double scale = double{softmax_scale()} * q_descale[descale_idx] * k_descale[descale_idx];
    const auto scale_of = [&](const std::vector<float>& scales, int j) {
      if (scales.empty()) return 1.0;
      return double{scales_of_tokens ? scales[key_tokens[seq][j] * num_kv_heads + kv_head] : scales[kv_head]};
    };

    std::vector<double> weights, cut_off;  // of a score: by how much wgmma's sums of fp8 may be short of it
    double largest = counts && has_sinks ? sinks[head] : -INFINITY;
    for (size_t at = 0; at < keys.size(); ++at) {
      const int j = keys[at];
      const float* const k_row = &k.values[(key_tokens[seq][j] * num_kv_heads + kv_head) * head_dim];
      double score = 0.0, cut = 0.0;
      for (int d = 0; d < head_dim; d += 32) {
        score += dot(q_row + d, k_row + d, std::min(32, head_dim - d));
        if (sizeof(T) == 1) cut += std::abs(score) * 0x1p-13;
      }
      score *= scale * scale_of(k_scale, j);
      cut *= scale;
      if (softcap > 0.0f) score = softcap * std::tanh(score / softcap);
      cut_off.push_back(cut);
      if (has_alibi) score -= slopes[head] * distances[at];
      weights.push_back(score);
      largest = std::max(largest, score);
    }
    double sum = counts && has_sinks ? std::exp(sinks[head] - largest) : 0.0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    // Of fp8 a product adds 32 columns to a sum, keeps 14 bits of it and cuts the rest off, less than 2^-13 of the sum.
    // The LSE moves by the mean of what the scores do, weighted with P (with a softcap, by less). All else is fp32.
    double lse_error = (sizeof(T) == 1 ? 1e-5 : 2e-4) * (1.0 + (sum > 0.0 ? std::abs(largest + std::log(sum)) : 0.0));
    std::vector<double> expected(v_head_dim, 0.0);
    for (size_t j = 0; j < weights.size(); ++j) {
      lse_error += weights[j] / sum * cut_off[j];
      const double weight = weights[j] / sum * scale_of(v_scale, keys[j]);
      const float* const v_row = &v.values[(key_tokens[seq][keys[j]] * num_kv_heads + kv_head) * v_head_dim];
      add_scaled(expected.data(), weight, v_row, v_head_dim);
    }

    const std::string where =
        " of sequence " + std::to_string(seq) + ", row " + std::to_string(i) + ", head " + std::to_string(head);
    const size_t lse_idx = packed_q ? static_cast<size_t>(head) * num_tokens + query_token(seq, i)
                                    : (static_cast<size_t>(seq) * num_heads + head) * q_lens[0] + i;
    require_near(lse[lse_idx], sum > 0.0 ? largest + std::log(sum) : -INFINITY, lse_error, "LSE" + where);
    const size_t row_begin = (query_token(seq, i) * num_heads + head) * v_head_dim;
    if (in_e4m3) return check_e4m3(row_begin, expected, where);
    const Out* const out_row = &out[row_begin];
    for (int d = 0; d < v_head_dim; ++d) {
      const double wanted = expected[d] * v_descale[descale_idx];
      require_near(static_cast<float>(out_row[d]), wanted, TypeInfo<T>::kTolerance * (1.0 + std::abs(wanted)),
                   "column " + std::to_string(d) + where);
    }
  }

  // Half a step of e4m3 beside what the fp32 results may be off by.
  void check_e4m3(size_t row_begin, const std::vector<double>& expected, const std::string& where) const {
    const auto* const row = reinterpret_cast<const __nv_fp8_e4m3*>(out.data()) + row_begin;
    for (size_t d = 0; d < expected.size(); ++d) {
      const double is = static_cast<float>(row[d]), wanted = std::clamp(expected[d] / out_scale, -448.0, 448.0);
      const double error = TypeInfo<T>::kTolerance * (1.0 + std::abs(expected[d])) / out_scale;
      if (std::abs(is - wanted) <= error + std::max(std::abs(wanted) / 16, 0x1p-10)) continue;
      fail("column " + std::to_string(d) + where + " is " + std::to_string(is) + " in e4m3, expected " +
           std::to_string(wanted));
    }
  }

  static void require_near(double is, double expected, double error, const std::string& what) {
    if (is == expected || std::abs(is - expected) <= error) return;
    fail(what + " is " + std::to_string(is) + ", expected " + std::to_string(expected));
  }
};

}  // namespace emulator
