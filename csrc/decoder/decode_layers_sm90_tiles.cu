// Instances of the kernel for a decoder's layers whose weights are NVFP4 in tiles: bf16, heads of 128, as those models
// are in which layers are long enough for 4 bits to count.
#include "decoder/decode_layers_sm90.cuh"

namespace fastattn {
namespace {

template <typename Weights>
cudaError_t launch_tiles(const DecodeLayersParams& p, cudaStream_t stream) {
  using T = typename Weights::T;
  return p.num_tokens == 1 ? launch<T, 128, 1, Weights>(p, stream)
                           : launch<T, 128, kDecodeMaxTokens, Weights>(p, stream);
}

}  // namespace

cudaError_t decode_layers_of_tiles_sm90(const DecodeLayersParams& p, cudaStream_t stream) {
  if (p.head_dim != 128 || p.dtype != DType::kBFloat16) return cudaErrorInvalidValue;
  return p.tiles_of_fours ? launch_tiles<Fp4TileOfFours<__nv_bfloat16, 16>>(p, stream)
                          : launch_tiles<Fp4Tile<__nv_bfloat16, 16>>(p, stream);
}

}  // namespace fastattn
