#include "arch/dispatch.h"
#include "gemm/gemm_sm90_few_rows.cuh"
#include "gemm/gemm_sm90_sampled.cuh"

namespace fastattn {
namespace {

template <typename T, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM>
cudaError_t launch(const GemmSm90SampledParams& p, cudaStream_t stream) {
  return launch_gemm_sm90_few_rows<GemmSm90Dense<T>, BLOCK_M, BLOCK_N, CTAS_PER_SM, GemmSm90Sampled>(p, stream);
}

struct Instantiation {
  GemmSm90Tile tile;
  cudaError_t (*launch)(const GemmSm90SampledParams&, cudaStream_t);
};

template <typename T>
constexpr Instantiation kTable[] = {
    {{8, 64, 2}, launch<T, 8, 64, 2>},       {{16, 64, 2}, launch<T, 16, 64, 2>},
    {{32, 64, 2}, launch<T, 32, 64, 2>},     {{64, 64, 2}, launch<T, 64, 64, 2>},
    {{64, 64, 1}, launch<T, 64, 64, 1>},     {{128, 64, 1}, launch<T, 128, 64, 1>},
    {{128, 128, 2}, launch<T, 128, 128, 2>}, {{256, 128, 1}, launch<T, 256, 128, 1>},
};

}  // namespace

cudaError_t gemm_sampled_sm90(const GemmSm90SampledParams& p, cudaStream_t stream) {
  if (!p.config.few_rows) return cudaErrorInvalidValue;
  return dispatch_half(p.dtype, [&](auto type) {
    for (const Instantiation& entry : kTable<decltype(type)>) {
      const GemmSm90Tile &tile = entry.tile, &wanted = p.config.tile;
      if (tile.block_m == wanted.block_m && tile.block_n == wanted.block_n && tile.ctas_per_sm == wanted.ctas_per_sm) {
        return entry.launch(p, stream);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fastattn
