// Instances of the kernel for a decoder's layers whose weights have 16 bits, and which calls it takes.
#include "arch/dispatch.h"
#include "decoder/decode_layers_sm90.cuh"

namespace fastattn {

cudaError_t decode_layers_sm90(const DecodeLayersParams& p, cudaStream_t stream) {
  const bool sized = p.hidden_size > 0 && p.num_heads > 0 && p.num_kv_heads > 0 && p.block_size > 0;
  if (!sized) return cudaErrorInvalidValue;
  const int num_ctas = decode_num_ctas(p), unit = p.tiles == nullptr ? kUnit : kTileRows;
  const bool fits = p.num_tokens >= 1 && p.num_tokens <= kDecodeMaxTokens && p.num_layers >= 1 &&
                    p.num_layers <= kDecodeMaxLayers && p.hidden_size % 64 == 0 && p.intermediate_size % 64 == 0 &&
                    p.num_heads % p.num_kv_heads == 0 && p.num_heads / p.num_kv_heads <= kDecodeMaxGroup &&
                    p.num_heads * p.head_dim % 64 == 0 && p.vocab_size % kUnit == 0 &&
                    (p.block_size & (p.block_size - 1)) == 0 && num_ctas >= p.num_tokens * p.num_heads &&
                    p.hidden_size / unit <= kOwnUnits * kUnit / unit * num_ctas;
  if (!fits) return cudaErrorInvalidValue;
  if (p.tiles != nullptr) return decode_layers_of_tiles_sm90(p, stream);
  return dispatch_half(p.dtype, [&](auto example) {
    using T = decltype(example);
    const bool one = p.num_tokens == 1;
    if (p.head_dim == 64) return one ? launch<T, 64, 1>(p, stream) : launch<T, 64, kDecodeMaxTokens>(p, stream);
    if (p.head_dim == 128) return one ? launch<T, 128, 1>(p, stream) : launch<T, 128, kDecodeMaxTokens>(p, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace fastattn
