// Dispatch table of flash_fwd_sm90.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/flash_fwd_sm90.h"
#include "attention/flash_fwd_sm90_launch.h"

namespace fastattn {
namespace {

struct Instantiation {
  DType dtype;
  int head_dim, v_head_dim;
  cudaError_t (*launch)(const FlashFwdSm90Params&, cudaStream_t);
};

// Which exist: add a line here and its instantiation in flash_fwd_sm90_hd*.cu.
constexpr Instantiation kInstantiations[] = {
    {DType::kBFloat16, 64, 64, launch_flash_fwd_sm90<__nv_bfloat16, 64, 64>},
    {DType::kBFloat16, 96, 96, launch_flash_fwd_sm90<__nv_bfloat16, 96, 96>},
    {DType::kBFloat16, 128, 128, launch_flash_fwd_sm90<__nv_bfloat16, 128, 128>},
    {DType::kBFloat16, 192, 192, launch_flash_fwd_sm90<__nv_bfloat16, 192, 192>},
    {DType::kBFloat16, 256, 256, launch_flash_fwd_sm90<__nv_bfloat16, 256, 256>},
    {DType::kBFloat16, 192, 128, launch_flash_fwd_sm90<__nv_bfloat16, 192, 128>},
    {DType::kBFloat16, 64, 256, launch_flash_fwd_sm90<__nv_bfloat16, 64, 256>},
    {DType::kFloat16, 64, 64, launch_flash_fwd_sm90<__half, 64, 64>},
    {DType::kFloat16, 96, 96, launch_flash_fwd_sm90<__half, 96, 96>},
    {DType::kFloat16, 128, 128, launch_flash_fwd_sm90<__half, 128, 128>},
    {DType::kFloat16, 192, 192, launch_flash_fwd_sm90<__half, 192, 192>},
    {DType::kFloat16, 256, 256, launch_flash_fwd_sm90<__half, 256, 256>},
    {DType::kFloat16, 192, 128, launch_flash_fwd_sm90<__half, 192, 128>},
    {DType::kFloat16, 64, 256, launch_flash_fwd_sm90<__half, 64, 256>},
};

}  // namespace

cudaError_t flash_fwd_sm90(const FlashFwdSm90Params& params, cudaStream_t stream) {
  for (const Instantiation& entry : kInstantiations) {
    const bool fits = entry.head_dim == params.config.head_dim && entry.v_head_dim == params.config.v_head_dim;
    if (fits && entry.dtype == params.dtype) return entry.launch(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
