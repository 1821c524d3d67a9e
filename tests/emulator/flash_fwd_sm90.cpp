// Draws calls of the Hopper attention kernel and holds its results against a reference.
#include "attention/flash_fwd_sm90.h"

#include "attention_call.h"

namespace {

using namespace emulator;
using fastattn::FlashFwdSm90HeadDims;
using fastattn::FlashFwdSm90Params;
using fastattn::FlashFwdSm90Tile;

// Instead of a head dim: 128, over pages of eight rows or odd multiples of them, without extras. Copies of eight rows
// have instances of their own, which few of the other calls are for.
constexpr int kEights = 8;

// K and V of type KV: T, or 8 bits in pages.
template <typename T, typename KV>
AttentionCall<T, KV> draw_call(const FlashFwdSm90HeadDims& dims, const FlashFwdSm90Tile& tile, bool eights) {
  constexpr bool kIsFp8 = sizeof(T) == 1, kWidens = sizeof(KV) < sizeof(T);
  constexpr int kRowUnit = 16 / sizeof(KV);  // rows are multiples of 16 bytes
  const int block_m = tile.block_m(), block_n = tile.block_n;
  AttentionCall<T, KV> call;
  const int num_seqs = pick({1, 2, 3, 5, 9, 35});
  const bool many = num_seqs > 9;
  call.num_kv_heads = many ? 1 : between(1, 2);
  call.group = many ? pick({1, 5}) : pick({1, 1, 2, 3, 4, 7});
  call.page_size = eights ? pick({8, 24, 40}) : kWidens || one_in(3) ? pick({8, 16, 24, 64, 128, 200}) : 0;
  const bool paged = call.page_size > 0;
  call.packed_q = paged || one_in(2);
  call.packed_k = !paged && call.packed_q;
  call.head_dim = dims.qk - pick({0, 0, kRowUnit});
  call.v_head_dim = dims.v - pick({0, 0, 16});
  if (paged) call.head_dim = call.v_head_dim = std::min(dims.qk, dims.v) - (kWidens ? pick({0, 0, 16}) : 0);
  call.has_scales = kWidens && (std::is_same_v<KV, int8_t> || one_in(2));
  call.scales_of_tokens = call.has_scales && one_in(2);
  call.scales_fall = one_in(2);

  int most_q =
      many ? 40 / call.group : pick({1, 17, 60, 130, 260, block_m, 2 * block_m}) / (call.group > 3 ? 4 : 1) + 1;
  int most_k = many ? 60 : pick({1, 40, block_n, 200, 3 * block_n + 5, 520});
  if (!paged && one_in(5)) {  // whole tiles of rows that a causal mask leaves without keys
    most_q = 3 * block_m;
    most_k = between(1, 30);
  }
  const bool has_seqused_q = !eights && one_in(5), has_seqused_k = paged || one_in(2);
  for (int seq = 0; seq < num_seqs; ++seq) {
    call.q_lens.push_back(call.packed_q ? pick({0, most_q, between(0, most_q), between(0, most_q)}) : most_q);
    const bool own_k_len = paged || call.packed_k;
    call.k_lens.push_back(own_k_len ? pick({0, 1, most_k, between(0, most_k), between(0, most_k)}) : most_k);
    if (has_seqused_q) call.seqused_q.push_back(between(0, call.q_lens[seq]));
    if (has_seqused_k) call.seqused_k.push_back(paged ? call.k_lens[seq] : between(0, call.k_lens[seq] + 2));
  }
  call.draw_extras();
  if (eights) {
    call.softcap = 0.0f;
    call.has_alibi = call.has_sinks = call.in_e4m3 = false;
  }
  call.has_descales = kIsFp8 && one_in(2);
  if (kIsFp8) call.growing_logits = false;  // inputs would leave its range
  call.in_e4m3 = call.in_e4m3 && !kIsFp8 && !has_seqused_q;
  call.make_tensors();
  return call;
}

// The kernel's own choice for a GPU of some size, then with splits and sections as they come in larger calls.
template <typename T, typename KV>
void choose_config(const AttentionCall<T, KV>& call, FlashFwdSm90Params& p) {
  const int num_sms = pick({1, 2, 3, 5, 40});
  const int longer = call.packed_q && one_in(2) ? pick({1, 300, 1100, 2100, 2100}) : 0;  // than any sequence is
  const int max_k = call.page_size > 0 ? call.max_blocks * call.page_size : std::max(1, call.max_k_len());
  fastattn::FlashFwdSm90Config& config = p.config;
  config = fastattn::flash_fwd_sm90_config({call.num_seqs, call.num_heads, call.num_kv_heads, call.head_dim,
                                            call.v_head_dim, call.max_q_len() + longer, max_k, call.causal, num_sms,
                                            call.packed_q ? call.num_tokens : -1, flash_fwd_sm90_extras(p),
                                            sizeof(T) == 1, sizeof(KV) < sizeof(T)});
  const int64_t num_whole = config.num_tiles / config.num_splits;
  if (num_whole < num_sms || one_in(4)) config.num_splits = pick({1, 2, 3, 5});
  config.num_tiles = num_whole * config.num_splits;
  config.num_ctas = std::min<int64_t>(config.num_tiles, num_sms);
  const int64_t num_pairs = int64_t{call.num_seqs} * config.tile_heads;
  const int64_t heads_of_kv = config.tile_heads / call.num_kv_heads;
  config.order =
      fastattn::SectionOrder::make(num_pairs, config.num_m_tiles, heads_of_kv * between(1, 3), call.causal, num_sms);
  config.heads_of_section = heads_of_kv * pick({1, call.num_kv_heads});
}

template <typename T, typename KV = T>
void run_call(const FlashFwdSm90HeadDims& dims, bool eights = false) {
  const FlashFwdSm90Tile tile = sizeof(KV) < sizeof(T) ? fastattn::flash_fwd_sm90_tile_widened(dims.v)
                                : sizeof(T) == 1       ? fastattn::flash_fwd_sm90_tile_fp8(dims.v, false, false)
                                                       : fastattn::flash_fwd_sm90_tile(dims.v, false);
  AttentionCall<T, KV> call = draw_call<T, KV>(dims, tile, eights);
  if (call.num_tokens == 0) return;
  FlashFwdSm90Params p;
  call.fill(p);
  const bool paged = call.page_size > 0;
  p.out_token_stride = int64_t{call.num_heads} * (p.out_head_stride = call.v_head_dim);
  if (!call.packed_q) {
    p.q_batch_stride = call.q_lens[0] * p.q_token_stride;
    p.out_batch_stride = call.q_lens[0] * p.out_token_stride;
  }
  p.q_tokens = call.packed_q ? call.num_tokens : call.q_lens[0];
  p.k_tokens = paged ? call.page_size : call.packed_k ? call.cu_seqlens_k.back() : call.k_lens[0];
  p.k_batch_stride = p.k_tokens * p.k_token_stride;
  p.v_batch_stride = p.k_tokens * p.v_token_stride;
  p.num_pages = call.num_pages;
  p.lse_head_stride = p.q_tokens;
  p.lse_batch_stride = p.q_tokens * call.num_heads;
  if (call.has_descales) {
    p.q_descale = {call.q_descale.data(), call.num_kv_heads, 1};
    p.k_descale = {call.k_descale.data(), call.num_kv_heads, 1};
    p.v_descale = {call.v_descale.data(), call.num_kv_heads, 1};
  }
  p.kv_dtype = TypeInfo<KV>::kDType;
  if (call.scales_of_tokens) {
    const int64_t token = call.num_kv_heads;
    p.k_scale = {call.k_scale.data(), token * call.page_size, token, 1};
    p.v_scale = {call.v_scale.data(), token * call.page_size, token, 1};
  } else if (call.has_scales) {
    p.k_descale = {call.k_scale.data(), 0, 1};
    p.v_descale = {call.v_scale.data(), 0, 1};
  }
  choose_config(call, p);
  if (call.packed_q && one_in(4)) p.min_q_len = between(1, call.max_q_len() + 1);
  p.beside = call.packed_q && p.config.num_splits == 1 && one_in(3);
  int32_t tile_counter;
  p.tile_counter = &tile_counter;
  const size_t num_partials = p.config.num_splits > 1 ? p.config.num_splits : 0;
  std::vector<float> partial_out(num_partials * call.num_tokens * call.num_heads * call.v_head_dim, NAN);
  std::vector<float> partial_lse(num_partials * call.num_tokens * call.num_heads, NAN);
  p.partial_out = partial_out.data();
  p.partial_lse = partial_lse.data();
  current_call += ": " + call.text() + "; " + std::to_string(p.config.tile.num_consumers) + " consumers, block_n " +
                  std::to_string(p.config.tile.block_n) + ", " + std::to_string(p.config.num_tiles) + " tiles, " +
                  std::to_string(p.config.num_splits) + " splits, " + std::to_string(p.config.num_ctas) +
                  " CTAs, min_q_len " + std::to_string(p.min_q_len) + (p.config.packs ? ", packs" : "") +
                  (p.beside ? ", beside" : "");

  const auto launch = [&] {
    tile_counter = p.beside ? 0 : -1;
    if (flash_fwd_sm90(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  call.check(p.min_q_len);
  if (one_in(3)) call.check_again(launch);
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int head_dim) {
    if (head_dim == kEights) {
      const FlashFwdSm90HeadDims dims = {128, 128};
      return one_in(2) ? run_call<__half>(dims, true) : run_call<__nv_bfloat16>(dims, true);
    }
    std::vector<FlashFwdSm90HeadDims> choices;
    for (const FlashFwdSm90HeadDims& dims : fastattn::kFlashFwdSm90HeadDims) {
      if (head_dim == 0 || (dims.qk == head_dim && dims.v == head_dim)) choices.push_back(dims);
    }
    const FlashFwdSm90HeadDims dims = choices[seed % choices.size()];
    const auto is_among = [](const FlashFwdSm90HeadDims& dims, const auto& others) {
      return std::any_of(std::begin(others), std::end(others),
                         [&](const auto& other) { return other.qk == dims.qk && other.v == dims.v; });
    };
    const FlashFwdSm90HeadDims fp8_dims = {dims.qk == 80 ? 96 : dims.qk, dims.v};
    if (is_among(fp8_dims, fastattn::kFlashFwdSm90Fp8HeadDims) && one_in(3)) {
      run_call<__nv_fp8_e4m3>(fp8_dims);
    } else if (is_among(dims, fastattn::kFlashFwdSm90FewHeadDims) && one_in(2)) {
      const bool fp8 = one_in(2);
      if (one_in(2)) {
        fp8 ? run_call<__half, __nv_fp8_e4m3>(dims) : run_call<__half, int8_t>(dims);
      } else {
        fp8 ? run_call<__nv_bfloat16, __nv_fp8_e4m3>(dims) : run_call<__nv_bfloat16, int8_t>(dims);
      }
    } else if (one_in(2)) {
      run_call<__half>(dims);
    } else {
      run_call<__nv_bfloat16>(dims);
    }
  });
}
