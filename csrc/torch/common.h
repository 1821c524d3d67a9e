// What every binding needs of torch, through its stable C interface only.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline bool is_fp8(const Tensor& t) { return t.scalar_type() == ScalarType::Float8_e4m3fn; }
inline bool is_8bit(const Tensor& t) { return is_fp8(t) || t.scalar_type() == ScalarType::Char; }

// bf16, fp16, fp32, e4m3 and int8 only; the checks have refused everything else.
DType dtype_of(const Tensor& t);

// The stream that torch works on at present, on t's device.
cudaStream_t stream_of(const Tensor& t);

// Multiprocessors of t's device.
int64_t num_sms_of(const Tensor& t);

// Bytes of shared memory that a CTA can have on t's device.
int64_t max_smem_of(const Tensor& t);

// Compute capability of t's device: 90 for Hopper.
int capability_of(const Tensor& t);

// Throws "op: the CUDA kernel could not be launched: …" unless error is cudaSuccess.
void check_launch(const char* op, cudaError_t error);

// A fresh contiguous tensor on like's device.
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

// A fresh contiguous copy.
Tensor packed_copy(const Tensor& t);

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

// The rows (last dimensions) of a tensor of one to three dimensions, and how many there are.
int64_t num_rows_of(const Tensor& t);
Rows rows_of(const Tensor& t);

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

// Makes t's device the current one as long as it lives.
struct OnDeviceOf : torch::stable::accelerator::DeviceGuard {
  explicit OnDeviceOf(const Tensor& t) : DeviceGuard(t.get_device_index()) {}
};

}  // namespace fastattn
