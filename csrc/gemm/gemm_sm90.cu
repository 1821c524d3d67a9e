// Dispatch table of gemm_sm90.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arch/dispatch.h"
#include "gemm/gemm_sm90.h"
#include "gemm/gemm_sm90_launch.h"

namespace fastattn {
namespace {

struct Instantiation {
  bool few_rows;
  GemmSm90Tile tile;
  cudaError_t (*launch)(const GemmSm90Params&, cudaStream_t);
};

template <typename T, int BLOCK_N>
constexpr Instantiation kManyRows = {false, {128, BLOCK_N}, launch_gemm_sm90<T, BLOCK_N>};
template <typename T, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM>
constexpr Instantiation kFewRows = {
    true, {BLOCK_M, BLOCK_N, CTAS_PER_SM}, launch_gemm_sm90_few_rows<T, BLOCK_M, BLOCK_N, CTAS_PER_SM>};

// Which exist: add a line here, in gemm_sm90_config.h, and its instantiation in gemm_sm90_*_rows.cu.
template <typename T>
constexpr Instantiation kInstantiations[] = {
    kManyRows<T, 128>,      kManyRows<T, 192>,       kManyRows<T, 224>,        kManyRows<T, 256>,
    kFewRows<T, 8, 64, 2>,  kFewRows<T, 16, 64, 2>,  kFewRows<T, 32, 64, 2>,   kFewRows<T, 64, 64, 2>,
    kFewRows<T, 64, 64, 1>, kFewRows<T, 128, 64, 1>, kFewRows<T, 128, 128, 2>, kFewRows<T, 256, 128, 1>,
};

}  // namespace

cudaError_t gemm_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  const GemmSm90Config& config = params.config;
  return dispatch_half(params.dtype, [&](auto type) {
    for (const Instantiation& entry : kInstantiations<decltype(type)>) {
      const GemmSm90Tile &tile = entry.tile, &wanted = config.tile;
      if (entry.few_rows == config.few_rows && tile.block_m == wanted.block_m && tile.block_n == wanted.block_n &&
          tile.ctas_per_sm == wanted.ctas_per_sm) {
        return entry.launch(params, stream);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace fastattn
