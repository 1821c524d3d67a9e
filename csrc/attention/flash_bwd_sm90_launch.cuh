// Tensor maps of a call and the launch of flash_bwd_sm90.cuh's kernel, for its instantiations.
#pragma once

#include "arch/launch.cuh"
#include "arch/tensor_map.h"
#include "attention/flash_bwd_sm90.cuh"
#include "attention/flash_bwd_sm90_launch.h"

namespace fastattn {

template <typename T, int HEAD_DIM>
cudaError_t launch_flash_bwd_sm90(const FlashBwdSm90Params& p, cudaStream_t stream) {
  using Storage = FlashBwdSm90Storage<T, HEAD_DIM>;
  constexpr int kSmemBytes = sizeof(Storage) + 1024;  // shared memory begins at any multiple of 16 bytes
  static_assert(kSmemBytes <= 227 * 1024 && kSmemBytes == flash_bwd_sm90_smem_bytes(HEAD_DIM));
  const FlashBwdSm90Config& config = p.config;
  if (config.num_tiles > INT32_MAX - config.num_ctas) return cudaErrorInvalidConfiguration;
  if (config.blocks_of_head * p.num_heads > INT32_MAX) return cudaErrorInvalidConfiguration;

  FlashBwdSm90Args args;
  args.p = p;
  args.group_size = FastDivide(p.num_heads / p.num_kv_heads);
  args.num_kv_heads = FastDivide(p.num_kv_heads);
  args.order = SectionLookup(config.order, config.num_n_tiles);
  args.num_tiles = static_cast<int32_t>(config.num_tiles);

  const auto describe = [&](const void* base, int32_t head_dim, int64_t tokens, int32_t heads, int64_t batch_stride,
                            int64_t token_stride, int64_t head_stride, int rows) {
    const int64_t batches = p.cu_seqlens_q == nullptr ? p.num_seqs : 1;
    return TensorMapSpec{
        base,           p.dtype, {head_dim, tokens, heads, batches}, {token_stride, head_stride, batch_stride},
        Storage::PANEL, rows};
  };
  const int64_t blocks = config.blocks_of_head;
  const auto describe_rows = [&](const float* base) {  // a block's numbers at a time
    constexpr int64_t M = Storage::BLOCK_M;
    return TensorMapSpec{base, DType::kFloat32, {M, blocks, p.num_heads, 1}, {M, blocks * M, 0}, M, 1};
  };
  const TensorMapSpec specs[6] = {describe(p.q, p.head_dim, p.q_tokens, p.num_heads, p.q_batch_stride, p.q_token_stride,
                                           p.q_head_stride, Storage::BLOCK_M),
                                  describe(p.dout, p.v_head_dim, p.q_tokens, p.num_heads, p.dout_batch_stride,
                                           p.dout_token_stride, p.dout_head_stride, Storage::BLOCK_M),
                                  describe(p.k, p.head_dim, p.k_tokens, p.num_kv_heads, p.k_batch_stride,
                                           p.k_token_stride, p.k_head_stride, Storage::BLOCK_N),
                                  describe(p.v, p.v_head_dim, p.k_tokens, p.num_kv_heads, p.v_batch_stride,
                                           p.v_token_stride, p.v_head_stride, Storage::BLOCK_N),
                                  describe_rows(p.lse_log2),
                                  describe_rows(p.delta)};
  CUtensorMap* const maps[6] = {&args.q, &args.dout, &args.k, &args.v, &args.lse_log2, &args.delta};
  for (int i = 0; i < 6; ++i) {
    const cudaError_t error = make_tensor_map(maps[i], specs[i]);
    if (error != cudaSuccess) return error;
  }

  const auto kernel =
      p.turns == nullptr ? flash_bwd_sm90_kernel<T, HEAD_DIM, false> : flash_bwd_sm90_kernel<T, HEAD_DIM, true>;
  return launch_kernel_behind(kernel, config.num_ctas, 384, kSmemBytes, stream, args);
}

}  // namespace fastattn
