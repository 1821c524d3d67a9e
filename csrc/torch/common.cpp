#include "torch/common.h"

#include <dlfcn.h>

#include <stdexcept>

namespace fastattn {

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Char:
      return DType::kInt8;
    default:
      return DType::kBFloat16;
  }
}

cudaStream_t stream_of(const Tensor& t) {
  // Found at run time: libtorch_cuda is not there where torch has no CUDA, and a weak symbol would stay null, because
  // torch loads its libraries without making their symbols global.
  using GetStream = int32_t (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(t.get_device_index(), &stream) != 0) {
    throw std::runtime_error(
        "fastattn: torch's current CUDA stream could not be found: is this a CUDA build of torch?");
  }
  return static_cast<cudaStream_t>(stream);
}

int64_t num_sms_of(const Tensor& t) {
  int count = 0;
  check_launch("fastattn", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}

int64_t max_smem_of(const Tensor& t) {
  int bytes = 0;
  check_launch("fastattn",
               cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, t.get_device_index()));
  return bytes;
}

int capability_of(const Tensor& t) {
  int major = 0, minor = 0;
  check_launch("fastattn", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, t.get_device_index()));
  check_launch("fastattn", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, t.get_device_index()));
  return 10 * major + minor;
}

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": the CUDA kernel could not be launched: " + cudaGetErrorString(error));
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

Tensor packed_copy(const Tensor& t) {
  Tensor copy = empty(t, shape_of(t), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

int64_t num_rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

Rows rows_of(const Tensor& t) {
  if (t.dim() == 1) return {1, 0, 0};
  const int64_t inner_stride = t.stride(t.dim() - 2);
  const int64_t inner = t.size(t.dim() - 2);
  if (t.dim() == 2 || t.size(0) == 1) return {inner, 0, inner_stride};
  if (t.stride(0) == inner * inner_stride) return {t.size(0) * inner, 0, inner_stride};
  return {inner, t.stride(0), inner_stride};
}

}  // namespace fastattn
