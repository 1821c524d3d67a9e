// Dispatch table of flash_sm80.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/flash_combine.h"
#include "attention/flash_sm80.h"
#include "attention/flash_sm80_launch.h"

namespace fastattn {
namespace {

using Launch = cudaError_t (*)(const FlashSm80Params&, cudaStream_t);

struct Instantiation {
  DType dtype;
  int head_dim;
  bool paged, tree;
  Launch launch;
};

// Which exist: add a line here and its instantiation in flash_sm80_hd*.cu.
constexpr DType kBf16 = DType::kBFloat16;
constexpr DType kFp16 = DType::kFloat16;
constexpr Instantiation kInstantiations[] = {
    // dtype, head dim, paged, tree
    {kBf16, 64, false, false, launch_flash_sm80<__nv_bfloat16, 64, ContiguousKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 64, true, false, launch_flash_sm80<__nv_bfloat16, 64, PagedKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 64, true, true, launch_flash_sm80<__nv_bfloat16, 64, PagedKv<__nv_bfloat16>, TreeMask>},
    {kBf16, 96, false, false, launch_flash_sm80<__nv_bfloat16, 96, ContiguousKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 96, true, false, launch_flash_sm80<__nv_bfloat16, 96, PagedKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 96, true, true, launch_flash_sm80<__nv_bfloat16, 96, PagedKv<__nv_bfloat16>, TreeMask>},
    {kBf16, 128, false, false, launch_flash_sm80<__nv_bfloat16, 128, ContiguousKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 128, true, false, launch_flash_sm80<__nv_bfloat16, 128, PagedKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 128, true, true, launch_flash_sm80<__nv_bfloat16, 128, PagedKv<__nv_bfloat16>, TreeMask>},
    {kBf16, 192, false, false, launch_flash_sm80<__nv_bfloat16, 192, ContiguousKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 192, true, false, launch_flash_sm80<__nv_bfloat16, 192, PagedKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 192, true, true, launch_flash_sm80<__nv_bfloat16, 192, PagedKv<__nv_bfloat16>, TreeMask>},
    {kBf16, 256, false, false, launch_flash_sm80<__nv_bfloat16, 256, ContiguousKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 256, true, false, launch_flash_sm80<__nv_bfloat16, 256, PagedKv<__nv_bfloat16>, AttentionMask>},
    {kBf16, 256, true, true, launch_flash_sm80<__nv_bfloat16, 256, PagedKv<__nv_bfloat16>, TreeMask>},
    {kFp16, 64, false, false, launch_flash_sm80<__half, 64, ContiguousKv<__half>, AttentionMask>},
    {kFp16, 64, true, false, launch_flash_sm80<__half, 64, PagedKv<__half>, AttentionMask>},
    {kFp16, 64, true, true, launch_flash_sm80<__half, 64, PagedKv<__half>, TreeMask>},
    {kFp16, 96, false, false, launch_flash_sm80<__half, 96, ContiguousKv<__half>, AttentionMask>},
    {kFp16, 96, true, false, launch_flash_sm80<__half, 96, PagedKv<__half>, AttentionMask>},
    {kFp16, 96, true, true, launch_flash_sm80<__half, 96, PagedKv<__half>, TreeMask>},
    {kFp16, 128, false, false, launch_flash_sm80<__half, 128, ContiguousKv<__half>, AttentionMask>},
    {kFp16, 128, true, false, launch_flash_sm80<__half, 128, PagedKv<__half>, AttentionMask>},
    {kFp16, 128, true, true, launch_flash_sm80<__half, 128, PagedKv<__half>, TreeMask>},
    {kFp16, 192, false, false, launch_flash_sm80<__half, 192, ContiguousKv<__half>, AttentionMask>},
    {kFp16, 192, true, false, launch_flash_sm80<__half, 192, PagedKv<__half>, AttentionMask>},
    {kFp16, 192, true, true, launch_flash_sm80<__half, 192, PagedKv<__half>, TreeMask>},
    {kFp16, 256, false, false, launch_flash_sm80<__half, 256, ContiguousKv<__half>, AttentionMask>},
    {kFp16, 256, true, false, launch_flash_sm80<__half, 256, PagedKv<__half>, AttentionMask>},
    {kFp16, 256, true, true, launch_flash_sm80<__half, 256, PagedKv<__half>, TreeMask>},
};

// A pair is a KV head of a sequence, or a part of its keys. With a causal mask the long tiles of a section come first,
// so that those which are left towards the end of the call are short.
constexpr int64_t kPairsOfSection = 32;

}  // namespace

cudaError_t flash_sm80_forward(const FlashSm80Params& params, cudaStream_t stream) {
  FlashSm80Params p = params;
  p.set_divisions();
  const int64_t num_pairs = static_cast<int64_t>(p.config.num_splits) * p.num_kv_heads * p.num_seqs;
  const int64_t num_ctas = p.config.num_m_tiles * num_pairs;
  if (num_ctas == 0) return cudaSuccess;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  p.order = SectionLookup(SectionOrder::make(num_pairs, p.config.num_m_tiles, kPairsOfSection, false, 0),
                          p.config.num_m_tiles);
  for (const Instantiation& entry : kInstantiations) {
    if (entry.dtype != p.dtype || entry.head_dim != p.config.head_dim || entry.paged != p.paged ||
        entry.tree != (p.tree_mask != nullptr)) {
      continue;
    }
    const cudaError_t error = entry.launch(p, stream);
    if (error != cudaSuccess || p.config.num_splits == 1) return error;
    return flash_combine({p.partial_out, p.partial_lse, p.out, p.lse, p.num_tokens,
                          p.cu_seqlens_q != nullptr ? p.num_tokens : p.batch_q_len, p.config.num_splits, p.num_heads,
                          p.v_head_dim, p.dtype, p.out_scale},
                         stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
