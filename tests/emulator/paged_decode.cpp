// Draws calls of the decode kernel and holds its results against a reference.
#include "attention/paged_decode.h"

#include "attention_call.h"

namespace {

using namespace emulator;
using fastattn::PagedDecodeParams;

// Shorter splits than the kernel's heuristic makes, so that few keys have many of them.
void set_split(PagedDecodeParams& p, int tiles_log2, int max_k_len) {
  const int keys = p.config.block_n << tiles_log2, num_splits = (max_k_len + keys - 1) / keys;
  p.config.split_tiles_log2 = tiles_log2;
  p.config.slots_of_area = num_splits > 1 ? std::min(num_splits, fastattn::kPagedDecodeMostSplits) + 1 : 0;
}

struct Workspace {
  std::vector<float> partial_out;
  std::vector<float2> partial_sum;
  std::vector<uint64_t> marks;

  explicit Workspace(PagedDecodeParams& p) {
    const size_t num_rows = size_t{2} * p.config.num_teams * p.config.slots_of_area * p.config.rows_of_slot;
    partial_out.assign(num_rows * p.v_head_dim, NAN);
    partial_sum.assign(num_rows, float2{NAN, NAN});
    marks.resize(p.config.slots_of_area > 0 ? p.config.num_teams : 0);
    for (uint64_t& mark : marks) mark = draws();
    p.partial_out = partial_out.data();
    p.partial_sum = partial_sum.data();
    p.marks = marks.data();
  }
};

// One that paged_decode_short.cuh has, if a cluster does.
template <typename T, typename KV>
AttentionCall<T, KV> draw_short_call(int head_dim) {
  AttentionCall<T, KV> call;
  call.num_kv_heads = between(1, 3);
  call.group = pick({1, 2, 3, 4, 8});
  call.page_size = pick({16, 48, 64});
  call.packed_q = true;
  call.head_dim = call.v_head_dim = head_dim;
  call.causal = one_in(2);
  if (call.causal) call.window_right = 0;
  call.in_e4m3 = one_in(4);
  call.growing_logits = one_in(4);
  const int num_seqs = pick({1, 2, 3, 5}), most_k = pick({1, 20, 150, 400, num_seqs < 3 ? 1500 : 400});
  const int most_q = between(1, fastattn::kPagedDecodeShortRows / call.group);
  for (int seq = 0; seq < num_seqs; ++seq) {
    call.q_lens.push_back(seq > 0 ? between(0, most_q) : most_q);
    call.k_lens.push_back(pick({0, 1, most_k, most_k, between(0, most_k)}));
    call.seqused_k.push_back(call.k_lens[seq]);
  }
  call.make_tensors();
  return call;
}

// many: sequences of few rows, for teams of one or two warps, of which one may have a sequence alone.
template <typename T, typename KV>
AttentionCall<T, KV> draw_call(int head_dim, bool many) {
  constexpr bool kIs8Bit = sizeof(KV) == 1;
  AttentionCall<T, KV> call;
  call.num_kv_heads = between(1, 3);
  call.group = many ? pick({1, 2, 3, 4, 8}) : pick({1, 2, 3, 4, 8, 16, 20});
  const int num_seqs = many ? pick({34, 40}) : pick({1, 2, 3, 5, 34, 40});
  call.page_size = !kIs8Bit && one_in(3) ? 0 : pick({1, 3, 8, 16, 64});
  const bool paged = call.page_size > 0;
  call.packed_q = paged || one_in(2);
  call.packed_k = !paged && call.packed_q;
  call.head_dim = head_dim - pick({0, 0, kIs8Bit ? 16 : 8});
  call.has_scales = kIs8Bit && (std::is_same_v<KV, int8_t> || one_in(2));
  call.scales_of_tokens = call.has_scales && one_in(2);
  call.v_head_dim = paged ? call.head_dim : pick({call.head_dim, head_dim, head_dim - 16});

  call.has_tree = !many && paged && one_in(2);
  const int most_q = between(1, std::max(1, (many ? 8 : kIs8Bit ? pick({50, 90}) : 32) / call.group));
  const int most_k = num_seqs > 30 ? pick({5, 60}) : pick({1, 20, 150, 400, num_seqs < 3 ? 1000 : 400});
  const bool has_seqused_q = one_in(4), has_seqused_k = paged || one_in(2);
  for (int seq = 0; seq < num_seqs; ++seq) {
    call.q_lens.push_back(call.packed_q && seq > 0 ? between(0, most_q) : most_q);
    const bool own_k_len = paged || call.packed_k;
    call.k_lens.push_back(own_k_len ? pick({0, 1, most_k, between(0, most_k), between(0, most_k)}) : most_k);
    if (has_seqused_q) call.seqused_q.push_back(between(0, call.q_lens[seq]));
    if (has_seqused_k) call.seqused_k.push_back(paged ? call.k_lens[seq] : between(0, call.k_lens[seq] + 2));
  }
  call.draw_extras();
  call.make_tensors();
  return call;
}

// Batch-invariant: some of the query tokens of a sequence, alone on another GPU, have the bits that they have in
// `call`, whose result is there.
template <typename T, typename KV>
void check_alone(AttentionCall<T, KV>& call, PagedDecodeParams p, int seq) {
  const int q_len = call.q_lens[seq], first = call.cu_seqlens_q[seq];
  if (q_len == 0 || q_len > p.max_q_len) return;
  const int num_sms = pick({1, 2, 50});
  const bool large_smem = one_in(2);
  const int splits_hold = (fastattn::kPagedDecodeMostSplits << p.config.split_tiles_log2) * p.config.block_n;
  // The last tokens of a chain see what they see, however many are before them; V's scales of tokens see the others'.
  const bool any_tokens = call.causal && !call.has_tree && call.seqused_q.empty() && !call.scales_of_tokens &&
                          call.k_lens[seq] <= splits_hold;
  const int num_tokens = any_tokens ? between(1, q_len) : q_len, from = q_len - num_tokens;
  const int split_tiles_log2 = p.config.split_tiles_log2;
  p.config = fastattn::paged_decode_config(
      {1, call.num_heads, call.num_kv_heads, std::max(call.head_dim, call.v_head_dim), num_tokens,
       std::max(call.k_lens[seq], 1), num_sms, large_smem, sizeof(KV) == 1, false, true});
  set_split(p, split_tiles_log2, std::max(call.k_lens[seq], 1));
  current_call += "; alone: the last " + std::to_string(num_tokens) + " of sequence " + std::to_string(seq);
  const std::vector<int> cu_seqlens_q = {0, num_tokens};
  std::vector<typename AttentionCall<T, KV>::Out> out(num_tokens * call.num_heads * call.v_head_dim);
  std::vector<float> lse(num_tokens * call.num_heads);
  p.q = call.q.data.data() + (first + from) * p.q_token_stride;
  p.out = out.data();
  p.lse = lse.data();
  p.cu_seqlens_q = cu_seqlens_q.data();
  p.block_table += seq * p.block_table_stride;
  p.num_seqs = 1;
  p.num_tokens = num_tokens;
  if (p.seqused_q != nullptr) p.seqused_q += seq;
  p.seqused_k += seq;
  if (p.tree_mask != nullptr) p.tree_mask += first;
  const Workspace workspace(p);
  if (paged_decode(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  const size_t token_bytes = call.num_heads * call.v_head_dim * (call.in_e4m3 ? 1 : sizeof(out[0]));
  const char* const in_batch = reinterpret_cast<const char*>(call.out.data()) + (first + from) * token_bytes;
  if (std::memcmp(out.data(), in_batch, num_tokens * token_bytes) != 0) {
    fail("batch-invariant, the output of a sequence alone differs");
  }
  for (int head = 0; head < call.num_heads; ++head) {
    const float* const in_batch = &call.lse[static_cast<size_t>(head) * call.num_tokens + first + from];
    if (std::memcmp(&lse[head * num_tokens], in_batch, num_tokens * sizeof(float)) != 0) {
      fail("batch-invariant, the LSE of a sequence alone differs");
    }
  }
}

// The pages of `keys`, whose heads of a token lie side by side, with a head's tokens side by side.
template <typename T, typename KV>
std::vector<KV> heads_apart(const AttentionCall<T, KV>& call, const std::vector<KV>& keys) {
  const int dim = call.head_dim, heads = call.num_kv_heads, tokens = call.page_size;
  std::vector<KV> apart;
  for (int page = 0; page < call.num_pages; ++page) {
    for (int i = 0; i < heads * tokens; ++i) {
      const KV* const row = keys.data() + ((int64_t{page} * tokens + i % tokens) * heads + i / tokens) * dim;
      apart.insert(apart.end(), row, row + dim);
    }
  }
  return apart;
}

template <typename T, typename KV = T>
void run_call(int head_dim, bool is_short = false, bool many = false) {
  AttentionCall<T, KV> call = is_short ? draw_short_call<T, KV>(head_dim) : draw_call<T, KV>(head_dim, many);
  PagedDecodeParams p;
  call.fill_portable(p);
  const bool paged = call.page_size > 0;
  p.kv_dtype = TypeInfo<KV>::kDType;
  if (call.has_scales) {
    const auto scale = [&](std::vector<float>& scales) {
      const int64_t token = call.scales_of_tokens ? call.num_kv_heads : 0;
      return fastattn::KvScale{scales.data(), token * call.page_size, token, 1};
    };
    p.k_scale = scale(call.k_scale);
    p.v_scale = scale(call.v_scale);
    p.scales_of_tokens = call.scales_of_tokens;
  }
  if (call.packed_q && !is_short && !many && one_in(5)) p.max_q_len = between(1, call.max_q_len());
  const int num_sms = is_short ? pick({30, 132}) : many ? pick({1, 2}) : pick({1, 3, 8, 30, 132});
  const int max_k_len = paged ? call.max_blocks * call.page_size : call.max_k_len();
  const bool beside = p.max_q_len < INT32_MAX && !call.has_tree && one_in(2),
             batch_invariant = paged && !is_short && !many && one_in(2);
  p.config = fastattn::paged_decode_config(
      {call.num_seqs, call.num_heads, call.num_kv_heads, std::max(call.head_dim, call.v_head_dim),
       std::min(call.max_q_len(), static_cast<int>(p.max_q_len)), max_k_len, num_sms, is_short || many || one_in(2),
       sizeof(KV) == 1, beside, batch_invariant, call.has_tree});
  if (batch_invariant) set_split(p, pick({p.config.split_tiles_log2, 0, 1}), max_k_len);
  current_call +=
      ": " + call.text() + "; " + std::to_string(p.config.num_warps) + " warps, " + std::to_string(p.config.num_parts) +
      " parts, " + std::to_string(p.config.num_ctas) + " CTAs, max_q_len " + std::to_string(p.max_q_len) +
      (p.config.beside_prompts ? ", beside prompts" : "") + ", clusters of 2^" + std::to_string(p.config.cluster_log2);
  if (batch_invariant) current_call += ", splits of 2^" + std::to_string(p.config.split_tiles_log2) + " tiles";
  if (!p.config.fits) fail("the kernel does not take the call");
  if (paged && one_in(3)) {
    call.k.data = heads_apart(call, call.k.data);
    call.v.data = heads_apart(call, call.v.data);
    p.k = call.k.data.data();
    p.v = call.v.data.data();
    p.k_token_stride = p.v_token_stride = call.head_dim;
    p.k_head_stride = p.v_head_stride = int64_t{call.page_size} * call.head_dim;
    current_call += ", heads apart";
  }
  const Workspace workspace(p);

  const auto launch = [&] {
    if (paged_decode(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  call.check(0, p.max_q_len);
  call.check_again(launch);
  if (batch_invariant) check_alone(call, p, between(0, call.num_seqs - 1));
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int head_dim) {
    const auto& dims = fastattn::kPagedDecodeHeadDims;
    if (seed % 4 == 3 && (head_dim == 0 || fastattn::paged_decode_short_has(head_dim, false))) {
      const int compiled = head_dim > 0 ? head_dim : pick({64, 128});
      return one_in(2) ? run_call<__half>(compiled, true) : run_call<__nv_bfloat16>(compiled, true);
    }
    const int compiled = head_dim > 0 ? head_dim : dims[seed % std::size(dims)];
    const bool many = seed % 8 == 2 && fastattn::paged_decode_has_8bit(compiled);
    const bool fp16 = one_in(2), is_8bit = many || (fastattn::paged_decode_has_8bit(compiled) && one_in(2)),
               fp8 = one_in(2);
    if (is_8bit && fp8) {
      fp16 ? run_call<__half, __nv_fp8_e4m3>(compiled, false, many)
           : run_call<__nv_bfloat16, __nv_fp8_e4m3>(compiled, false, many);
    } else if (is_8bit) {
      fp16 ? run_call<__half, int8_t>(compiled, false, many) : run_call<__nv_bfloat16, int8_t>(compiled, false, many);
    } else {
      fp16 ? run_call<__half>(compiled) : run_call<__nv_bfloat16>(compiled);
    }
  });
}
