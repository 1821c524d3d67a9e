// Dispatch table of flash_fwd_sm90.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "attention/flash_fwd_sm90.h"
#include "attention/flash_fwd_sm90_launch.h"

namespace fastattn {
namespace {

struct Instantiation {
  DType dtype;
  int head_dim, v_head_dim, num_consumers, block_n;
  bool extras, widens, packs;
  cudaError_t (*launch)(const FlashFwdSm90Params&, cudaStream_t);
};

template <typename T>
constexpr DType kDType = DType::kFloat8E4M3;
template <>
constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<__half> = DType::kFloat16;

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool EXTRAS, bool WIDENS = false,
          bool PACKS = false>
constexpr Instantiation kInstance = {
    kDType<T>,
    HEAD_DIM,
    V_HEAD_DIM,
    NUM_CONSUMERS,
    BLOCK_N,
    EXTRAS,
    WIDENS,
    PACKS,
    launch_flash_fwd_sm90<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, EXTRAS, WIDENS, PACKS>};

// Which exist: add a line here and its instantiation in flash_fwd_sm90_*hd*.cu.
constexpr Instantiation kInstantiations[] = {
    kInstance<__nv_bfloat16, 64, 64, 3, 128, false>,
    kInstance<__nv_bfloat16, 64, 64, 3, 128, true>,
    kInstance<__nv_bfloat16, 80, 80, 2, 128, false>,
    kInstance<__nv_bfloat16, 80, 80, 3, 112, false>,
    kInstance<__nv_bfloat16, 80, 80, 3, 112, true>,
    kInstance<__nv_bfloat16, 96, 96, 2, 128, false>,
    kInstance<__nv_bfloat16, 96, 96, 3, 96, false>,
    kInstance<__nv_bfloat16, 96, 96, 3, 96, true>,
    kInstance<__nv_bfloat16, 128, 128, 2, 128, false>,
    kInstance<__nv_bfloat16, 128, 128, 2, 128, true>,
    kInstance<__nv_bfloat16, 192, 128, 2, 128, false>,
    kInstance<__nv_bfloat16, 192, 128, 2, 128, true>,
    kInstance<__nv_bfloat16, 192, 192, 2, 96, false>,
    kInstance<__nv_bfloat16, 192, 192, 2, 96, true>,
    kInstance<__nv_bfloat16, 64, 256, 2, 80, false>,
    kInstance<__nv_bfloat16, 64, 256, 2, 80, true>,
    kInstance<__nv_bfloat16, 256, 256, 2, 80, false>,
    kInstance<__nv_bfloat16, 256, 256, 2, 80, true>,
    kInstance<__half, 64, 64, 3, 128, false>,
    kInstance<__half, 64, 64, 3, 128, true>,
    kInstance<__half, 80, 80, 2, 128, false>,
    kInstance<__half, 80, 80, 3, 112, false>,
    kInstance<__half, 80, 80, 3, 112, true>,
    kInstance<__half, 96, 96, 2, 128, false>,
    kInstance<__half, 96, 96, 3, 96, false>,
    kInstance<__half, 96, 96, 3, 96, true>,
    kInstance<__half, 128, 128, 2, 128, false>,
    kInstance<__half, 128, 128, 2, 128, true>,
    kInstance<__half, 192, 128, 2, 128, false>,
    kInstance<__half, 192, 128, 2, 128, true>,
    kInstance<__half, 192, 192, 2, 96, false>,
    kInstance<__half, 192, 192, 2, 96, true>,
    kInstance<__half, 64, 256, 2, 80, false>,
    kInstance<__half, 64, 256, 2, 80, true>,
    kInstance<__half, 256, 256, 2, 80, false>,
    kInstance<__half, 256, 256, 2, 80, true>,
    kInstance<__nv_bfloat16, 64, 64, 2, 128, false, false, true>,
    kInstance<__nv_bfloat16, 64, 64, 2, 128, true, false, true>,
    kInstance<__nv_bfloat16, 128, 128, 2, 128, false, false, true>,
    kInstance<__nv_bfloat16, 128, 128, 2, 128, true, false, true>,
    kInstance<__nv_bfloat16, 256, 256, 2, 80, false, false, true>,
    kInstance<__nv_bfloat16, 256, 256, 2, 80, true, false, true>,
    kInstance<__half, 64, 64, 2, 128, false, false, true>,
    kInstance<__half, 64, 64, 2, 128, true, false, true>,
    kInstance<__half, 128, 128, 2, 128, false, false, true>,
    kInstance<__half, 128, 128, 2, 128, true, false, true>,
    kInstance<__half, 256, 256, 2, 80, false, false, true>,
    kInstance<__half, 256, 256, 2, 80, true, false, true>,
    kInstance<__nv_bfloat16, 64, 64, 2, 128, false, true>,
    kInstance<__nv_bfloat16, 64, 64, 2, 128, true, true>,
    kInstance<__nv_bfloat16, 128, 128, 2, 128, false, true>,
    kInstance<__nv_bfloat16, 128, 128, 2, 128, true, true>,
    kInstance<__nv_bfloat16, 256, 256, 2, 64, false, true>,
    kInstance<__nv_bfloat16, 256, 256, 2, 64, true, true>,
    kInstance<__half, 64, 64, 2, 128, false, true>,
    kInstance<__half, 64, 64, 2, 128, true, true>,
    kInstance<__half, 128, 128, 2, 128, false, true>,
    kInstance<__half, 128, 128, 2, 128, true, true>,
    kInstance<__half, 256, 256, 2, 64, false, true>,
    kInstance<__half, 256, 256, 2, 64, true, true>,
    kInstance<__nv_fp8_e4m3, 64, 64, 3, 128, false>,
    kInstance<__nv_fp8_e4m3, 64, 64, 3, 128, true>,
    kInstance<__nv_fp8_e4m3, 96, 80, 2, 192, false>,
    kInstance<__nv_fp8_e4m3, 96, 80, 3, 128, false>,
    kInstance<__nv_fp8_e4m3, 96, 80, 2, 192, true>,
    kInstance<__nv_fp8_e4m3, 96, 96, 2, 192, false>,
    kInstance<__nv_fp8_e4m3, 96, 96, 3, 128, false>,
    kInstance<__nv_fp8_e4m3, 96, 96, 2, 192, true>,
    kInstance<__nv_fp8_e4m3, 128, 128, 2, 192, false>,
    kInstance<__nv_fp8_e4m3, 128, 128, 2, 192, true>,
    kInstance<__nv_fp8_e4m3, 192, 192, 2, 128, false>,
    kInstance<__nv_fp8_e4m3, 192, 192, 2, 160, false>,
    kInstance<__nv_fp8_e4m3, 192, 192, 2, 128, true>,
    kInstance<__nv_fp8_e4m3, 256, 256, 2, 96, false>,
    kInstance<__nv_fp8_e4m3, 256, 256, 2, 96, true>,
};

}  // namespace

cudaError_t flash_fwd_sm90(const FlashFwdSm90Params& params, cudaStream_t stream) {
  const FlashFwdSm90Config& config = params.config;
  for (const Instantiation& entry : kInstantiations) {
    if (entry.dtype == params.dtype && entry.head_dim == config.head_dim && entry.v_head_dim == config.v_head_dim &&
        entry.num_consumers == config.tile.num_consumers && entry.block_n == config.tile.block_n &&
        entry.extras == flash_fwd_sm90_extras(params) && entry.widens == flash_fwd_sm90_widens(params) &&
        entry.packs == config.packs) {
      return entry.launch(params, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
