// Draws calls of the portable attention kernel and holds its results against a reference.
#include "attention/flash_sm80.h"

#include "attention_call.h"

namespace {

using namespace emulator;
using fastattn::FlashSm80Params;

template <typename T>
AttentionCall<T> draw_call(int head_dim) {
  AttentionCall<T> call;
  const int num_seqs = pick({1, 2, 3, 5, 5, 35});
  const bool many = num_seqs > 5;  // CTAs in several sections
  call.num_kv_heads = between(1, 2);
  call.group = pick({1, 2, 3, 8});
  call.page_size = one_in(3) ? 0 : pick({1, 3, 8, 16, 64});
  const bool paged = call.page_size > 0;
  call.packed_q = paged || one_in(2);
  call.packed_k = !paged && call.packed_q;
  call.head_dim = head_dim - pick({0, 0, 8});
  call.v_head_dim = paged ? call.head_dim : pick({call.head_dim, head_dim, head_dim - 16});
  call.has_tree = paged && !one_in(3);

  const int most_q = many ? pick({20, 70}) : pick({1, 16, 64, 90}), most_k = many ? 40 : pick({1, 60, 150, 300});
  const bool has_seqused_q = !paged && one_in(4), has_seqused_k = paged || one_in(2);
  for (int seq = 0; seq < num_seqs; ++seq) {
    call.q_lens.push_back(call.packed_q ? pick({0, most_q, between(0, most_q), between(0, most_q)}) : most_q);
    const bool own_k_len = paged || call.packed_k;
    call.k_lens.push_back(own_k_len ? pick({0, 1, most_k, between(0, most_k), between(0, most_k)}) : most_k);
    if (has_seqused_q) call.seqused_q.push_back(between(0, call.q_lens[seq]));
    if (has_seqused_k) call.seqused_k.push_back(paged ? call.k_lens[seq] : between(0, call.k_lens[seq] + 2));
  }
  call.draw_extras();
  call.make_tensors();
  return call;
}

template <typename T>
void run_call(int head_dim) {
  AttentionCall<T> call = draw_call<T>(head_dim);
  if (call.num_tokens == 0) return;
  FlashSm80Params p;
  call.fill_portable(p);
  const bool paged = call.page_size > 0;
  if (call.has_tree && one_in(3)) {
    p.min_q_len = between(0, call.max_q_len());
    p.max_q_len = between(p.min_q_len, call.max_q_len());
  }
  const int num_sms = pick({1, 3, 30});
  p.config = fastattn::flash_sm80_config({call.num_seqs, call.num_heads, call.num_kv_heads,
                                          std::max(call.head_dim, call.v_head_dim),
                                          std::min(call.max_q_len(), static_cast<int>(p.max_q_len)),
                                          paged ? call.max_blocks * call.page_size : call.max_k_len(), num_sms});
  if (p.min_q_len > 0) p.config.num_splits = 1;
  current_call += ": " + call.text() + "; " + std::to_string(p.config.num_splits) + " splits, q_len " +
                  std::to_string(p.min_q_len) + " to " + std::to_string(p.max_q_len);
  const size_t num_partials = p.config.num_splits > 1 || call.in_e4m3 ? p.config.num_splits : 0;
  std::vector<float> partial_out(num_partials * call.num_tokens * call.num_heads * call.v_head_dim, NAN);
  std::vector<float> partial_lse(num_partials * call.num_tokens * call.num_heads, NAN);
  p.partial_out = partial_out.data();
  p.partial_lse = partial_lse.data();

  const auto launch = [&] {
    if (flash_sm80_forward(p, nullptr) != cudaSuccess) fail("no instantiation takes the call");
  };
  launch();
  call.check(p.min_q_len, p.max_q_len);
  if (one_in(3)) call.check_again(launch);
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int seed, int head_dim) {
    const auto& dims = fastattn::kFlashSm80HeadDims;
    const int compiled = head_dim > 0 ? head_dim : dims[seed % std::size(dims)];
    one_in(2) ? run_call<__half>(compiled) : run_call<__nv_bfloat16>(compiled);
  });
}
