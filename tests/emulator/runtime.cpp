// What the kernels' host code calls of CUDA's runtime and driver.
#include <cudaTypedefs.h>

#include "tensor_map.h"

extern "C" cudaError_t cudaMemsetAsync(void* target, int value, size_t num_bytes, cudaStream_t) {
  std::memset(target, value, num_bytes);
  return cudaSuccess;
}

extern "C" cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

namespace emulator {
namespace {

void require(bool condition, const char* what) {
  if (!condition) fail(std::string("cuTensorMapEncodeTiled: ") + what);
}

// The rules are the driver's.
CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  require(rank == 4 || rank == 5, "four or five dimensions are all that is known here");
  require(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, "other modes");
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "a base that is not a multiple of 16");
  TensorMap result = {nullptr, {1, 1, 1, 1, 1}, {}, {1, 1, 1, 1, 1}, static_cast<uint16_t>(rank), 0};
  result.base = static_cast<const unsigned char*>(base);
  result.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  for (cuuint32_t i = 0; i < rank; ++i) {
    require(sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32, "a size that is 0 or above 2^32");
    require(steps[i] == 1, "steps");
    result.sizes[i] = static_cast<int64_t>(sizes[i]);
    result.strides[i] = i == 0 ? result.element_bytes : static_cast<int64_t>(strides[i - 1]);
    require(i == 0 || (result.strides[i] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40), "a stride");
  }
  for (cuuint32_t i = 0; i < rank; ++i) {
    require(box[i] >= 1 && box[i] <= 256, "a box that is empty, or larger than 256");
    result.box[i] = static_cast<int>(box[i]);
  }
  const int row_bytes = result.box[0] * result.element_bytes;
  require(row_bytes % 16 == 0, "a row of the box that is not a multiple of 16 bytes");
  // A row of neither length may have no swizzle: the driver would allow that to others too, no kernel has it.
  require(swizzle == (row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                      : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                        : CU_TENSOR_MAP_SWIZZLE_NONE),
          "a row of the box is what the swizzle is of");
  std::memcpy(map, &result, sizeof(result));
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace emulator

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, unsigned long long,
                                                        cudaDriverEntryPointQueryResult*) {
  *function = reinterpret_cast<void*>(emulator::encode_tensor_map);
  return cudaSuccess;
}
