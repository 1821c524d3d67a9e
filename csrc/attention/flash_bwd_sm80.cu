// Dispatch table of flash_bwd_sm80, and the pass over tokens that belong to no sequence.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/flash_bwd_sm80.h"
#include "attention/flash_bwd_sm80_launch.h"

namespace fastattn {
namespace {

using Launch = cudaError_t (*)(const FlashBwdSm80Params&, cudaStream_t);

struct Instantiation {
  DType dtype;
  int head_dim;
  bool large;  // shared memory for the large tile
  Launch launch;
};

// Which exist: add a line here and its instantiation in flash_bwd_sm80_hd*.cu.
constexpr Instantiation kInstantiations[] = {
    {DType::kBFloat16, 64, false, launch_flash_bwd_sm80<__nv_bfloat16, 64, false>},
    {DType::kBFloat16, 96, false, launch_flash_bwd_sm80<__nv_bfloat16, 96, false>},
    {DType::kBFloat16, 128, false, launch_flash_bwd_sm80<__nv_bfloat16, 128, false>},
    {DType::kBFloat16, 192, false, launch_flash_bwd_sm80<__nv_bfloat16, 192, false>},
    {DType::kBFloat16, 256, false, launch_flash_bwd_sm80<__nv_bfloat16, 256, false>},
    {DType::kBFloat16, 256, true, launch_flash_bwd_sm80<__nv_bfloat16, 256, true>},
    {DType::kFloat16, 64, false, launch_flash_bwd_sm80<__half, 64, false>},
    {DType::kFloat16, 96, false, launch_flash_bwd_sm80<__half, 96, false>},
    {DType::kFloat16, 128, false, launch_flash_bwd_sm80<__half, 128, false>},
    {DType::kFloat16, 192, false, launch_flash_bwd_sm80<__half, 192, false>},
    {DType::kFloat16, 256, false, launch_flash_bwd_sm80<__half, 256, false>},
    {DType::kFloat16, 256, true, launch_flash_bwd_sm80<__half, 256, true>},
};

// Whether one of the sequences uses the token. Batches have no offsets.
__device__ bool in_use(int64_t token, const int32_t* cu_seqlens, const int32_t* seqused, int32_t num_seqs,
                       int64_t batch_tokens) {
  int64_t seq_idx, first, length;
  if (cu_seqlens != nullptr) {
    if (token < cu_seqlens[0] || token >= cu_seqlens[num_seqs]) return false;
    // The last sequence that begins at the token or before: empty ones that begin there come before it.
    int32_t low = 0, high = num_seqs - 1;
    while (low < high) {
      const int32_t middle = (low + high + 1) / 2;
      if (cu_seqlens[middle] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    seq_idx = low;
    first = cu_seqlens[low];
    length = cu_seqlens[low + 1] - first;
  } else {
    seq_idx = token / batch_tokens;
    first = seq_idx * batch_tokens;
    length = batch_tokens;
  }
  if (seqused != nullptr) length = min(length, static_cast<int64_t>(seqused[seq_idx]));
  return token - first < length;
}

// 16-bit zeros for all heads of a token, by one warp.
__device__ void clear_token(const FlashBwdSm80Params::Output& t, int64_t token, int64_t batch_tokens, bool packed,
                            int32_t num_heads, int32_t head_dim) {
  const int64_t offset =
      packed ? token * t.token_stride : token / batch_tokens * t.batch_stride + token % batch_tokens * t.token_stride;
  uint16_t* const row = static_cast<uint16_t*>(t.data) + offset;
  const int32_t chunks = head_dim / 8;
  for (int32_t i = threadIdx.x % 32; i < num_heads * chunks; i += 32) {
    *reinterpret_cast<uint4*>(row + i / chunks * t.head_stride + i % chunks * 8) = make_uint4(0, 0, 0, 0);
  }
}

// A warp for each token, q's first.
__global__ void __launch_bounds__(128)
    clear_unused_kernel(const __grid_constant__ FlashBwdSm80Params p, int64_t total_q, int64_t total_k) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const bool packed = p.cu_seqlens_q != nullptr;
  if (index < total_q) {
    if (in_use(index, p.cu_seqlens_q, p.seqused_q, p.num_seqs, p.q_tokens)) return;
    clear_token(p.dq, index, p.q_tokens, packed, p.num_heads, p.head_dim);
  } else if (index < total_q + total_k) {
    const int64_t token = index - total_q;
    if (in_use(token, p.cu_seqlens_k, p.seqused_k, p.num_seqs, p.k_tokens)) return;
    clear_token(p.dk, token, p.k_tokens, packed, p.num_kv_heads, p.head_dim);
    clear_token(p.dv, token, p.k_tokens, packed, p.num_kv_heads, p.v_head_dim);
  }
}

cudaError_t clear_unused(const FlashBwdSm80Params& p, cudaStream_t stream) {
  const bool packed = p.cu_seqlens_q != nullptr;
  if (!packed && p.seqused_q == nullptr && p.seqused_k == nullptr) return cudaSuccess;
  const int64_t total_q = packed ? p.q_tokens : p.num_seqs * p.q_tokens;
  const int64_t total_k = packed ? p.k_tokens : p.num_seqs * p.k_tokens;
  const int64_t num_ctas = (total_q + total_k + 3) / 4;
  if (num_ctas == 0) return cudaSuccess;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  clear_unused_kernel<<<static_cast<unsigned>(num_ctas), 128, 0, stream>>>(p, total_q, total_k);
  return cudaGetLastError();
}

}  // namespace

cudaError_t flash_bwd_sm80(const FlashBwdSm80Params& params, cudaStream_t stream) {
  for (const Instantiation& entry : kInstantiations) {
    if (entry.dtype != params.dtype || entry.head_dim != params.config.head_dim || entry.large != params.config.large) {
      continue;
    }
    const cudaError_t error = clear_unused(params, stream);
    return error != cudaSuccess ? error : entry.launch(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
