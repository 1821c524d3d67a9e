// Starting FlashAttention's forward (flash_fwd_sm90.cuh): what a launch's CTAs look up, the tensor maps, which kernel.
#pragma once

#include <algorithm>
#include <numeric>

#include "arch/launch.cuh"
#include "arch/tensor_map.h"
#include "attention/flash_combine.h"
#include "attention/flash_fwd_sm90.cuh"
#include "attention/flash_fwd_sm90_launch.h"

namespace fastattn {

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool EXTRAS, bool WIDENS,
          bool PACKS>
cudaError_t launch_flash_fwd_sm90(const FlashFwdSm90Params& p, cudaStream_t stream) {
  using Storage = FlashFwdSm90StorageOf<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, WIDENS>;
  constexpr int kSmemBytes = sizeof(Storage);
  static_assert(kSmemBytes <= 227 * 1024);
  const FlashFwdSm90Config& config = p.config;
  if (config.num_tiles == 0) return cudaSuccess;  // no sequence has a row
  if (config.num_tiles > INT32_MAX - config.num_ctas) return cudaErrorInvalidConfiguration;

  FlashFwdSm90Args args;
  args.p = p;
  args.group_size = FastDivide(p.num_heads / p.num_kv_heads);
  args.tile_heads = FastDivide(static_cast<int32_t>(config.tile_heads));
  args.tile_tokens = static_cast<int32_t>(config.tile_tokens);
  if (p.cu_seqlens_q == nullptr) args.order = SectionLookup(config.order, config.num_m_tiles);
  args.num_splits = FastDivide(config.num_splits);
  args.num_m_tiles = static_cast<int32_t>(config.num_m_tiles);
  args.heads_of_section = static_cast<int32_t>(config.heads_of_section);
  args.num_tiles = static_cast<int32_t>(config.num_tiles);
  args.few_keys = flash_fwd_sm90_few_keys(config, p.num_seqs, p.num_kv_heads, sizeof(T));

  const bool paged = p.block_table != nullptr;
  const int box_rows = paged ? static_cast<int>(std::gcd(p.k_tokens, int64_t{BLOCK_N})) : BLOCK_N;
  args.page_size = FastDivide(paged ? static_cast<int32_t>(p.k_tokens) : 1);
  args.box_rows = box_rows;
  args.num_boxes = BLOCK_N / box_rows;

  const int64_t q_batches = p.cu_seqlens_q == nullptr ? p.num_seqs : 1;
  const int64_t k_batches = paged ? p.num_pages : p.cu_seqlens_k == nullptr ? p.num_seqs : 1;
  constexpr int kPanel = kPanelOf<T, HEAD_DIM>;
  constexpr int kKPanel = WIDENS ? kRawPanel<HEAD_DIM> : kPanel;
  constexpr int kVPanel = WIDENS ? kKPanel : kPanelOf<T, V_HEAD_DIM>;
  const DType kv_dtype = WIDENS ? DType::kFloat8E4M3 : p.dtype;  // to a copy int8 is the same
  const bool no_keys = p.k_tokens * k_batches == 0;              // none is read, but a map must be of something
  const TensorMapSpec q_spec = PACKS ? TensorMapSpec{p.q,
                                                     p.dtype,
                                                     {p.head_dim, p.num_heads, p.q_tokens, q_batches},
                                                     {p.q_head_stride, p.q_token_stride, p.q_batch_stride},
                                                     kPanel,
                                                     p.num_heads / p.num_kv_heads,
                                                     true,
                                                     args.tile_tokens}
                                     : TensorMapSpec{p.q,
                                                     p.dtype,
                                                     {p.head_dim, p.q_tokens, p.num_heads, q_batches},
                                                     {p.q_token_stride, p.q_head_stride, p.q_batch_stride},
                                                     kPanel,
                                                     Storage::BLOCK_M};
  const TensorMapSpec specs[3] = {q_spec,
                                  {no_keys ? p.q : p.k,
                                   kv_dtype,
                                   {p.head_dim, std::max<int64_t>(p.k_tokens, 1), p.num_kv_heads, k_batches},
                                   {p.k_token_stride, p.k_head_stride, p.k_batch_stride},
                                   kKPanel,
                                   box_rows},
                                  {no_keys ? p.q : p.v,
                                   kv_dtype,
                                   {p.v_head_dim, std::max<int64_t>(p.k_tokens, 1), p.num_kv_heads, k_batches},
                                   {p.v_token_stride, p.v_head_stride, p.v_batch_stride},
                                   kVPanel,
                                   box_rows}};
  // Boxes of eight rows are many and small: two panels come in one copy.
  constexpr bool CAN_HAVE_EIGHTS =
      sizeof(T) == 2 && HEAD_DIM == 128 && V_HEAD_DIM == 128 && !EXTRAS && !WIDENS && !PACKS;
  const bool eights = CAN_HAVE_EIGHTS && paged && box_rows == 8 && p.head_dim == HEAD_DIM && p.v_head_dim == V_HEAD_DIM;
  CUtensorMap* const maps[3] = {&args.q, &args.k, &args.v};
  for (int i = 0; i < 3; ++i) {
    const cudaError_t error = make_tensor_map(maps[i], specs[i], eights && i > 0);
    if (error != cudaSuccess) return error;
  }

  const auto kernel_of = [](auto has_eights) {
    return flash_fwd_sm90_kernel<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, EXTRAS, WIDENS, PACKS, has_eights()>;
  };
  const auto kernel =
      eights ? kernel_of(std::bool_constant<CAN_HAVE_EIGHTS>()) : kernel_of(std::bool_constant<false>());
  if (!p.beside && config.num_tiles > config.num_ctas) {
    const cudaError_t error = cudaMemsetAsync(p.tile_counter, 0, sizeof(int32_t), stream);
    if (error != cudaSuccess) return error;
  }
  const int num_threads = config.tile.num_threads();
  const cudaError_t error = p.beside
                                ? launch_kernel_behind(kernel, config.num_ctas, num_threads, kSmemBytes, stream, args)
                                : launch_kernel(kernel, config.num_ctas, num_threads, kSmemBytes, stream, args);
  if (error != cudaSuccess || config.num_splits == 1) return error;
  return flash_combine({p.partial_out, p.partial_lse, p.out, p.lse, p.num_tokens, p.q_tokens, config.num_splits,
                        p.num_heads, p.v_head_dim, sizeof(T) == 1 ? DType::kBFloat16 : p.dtype, p.out_scale},
                       stream);
}

}  // namespace fastattn
