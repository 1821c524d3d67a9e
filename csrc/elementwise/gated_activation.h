// out = act(gate) * up with gate and up side by side, or in turns. The kernel is in gated_activation.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

enum class Activation : int32_t { kSilu, kGeluTanh, kGelu };

struct GatedActivationParams {
  const void* x = nullptr;  // (rows, 2N): gate, then up; interleaved: eight gates, their eight ups, and so on (the last
                            // may be fewer, of each as many); rows contiguous
  void* out = nullptr;      // (rows, N) contiguous
  Rows x_rows;
  int64_t num_rows = 0;
  int64_t width = 0;  // N
  Activation activation = Activation::kSilu;
  bool interleaved = false;
  DType dtype = DType::kBFloat16;
};

// Needs rows > 0 and N > 0. cudaErrorInvalidValue for a dtype that is not bf16 or fp16.
cudaError_t gated_activation(const GatedActivationParams& params, cudaStream_t stream);

}  // namespace fastattn
