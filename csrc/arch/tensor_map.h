// Describes a tensor in device memory to the copy engine (TMA). Host side; the loads are in arch/tma.cuh.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

// Four dimensions of elements of 8, 16 or 32 bits, the contiguous one first; strides of the others in elements,
// multiples of 16 bytes. One copy takes a box of `panel` x `rows` x `planes` elements: panels of 128 bytes are laid out
// with a swizzle of 128 bytes, of 64 with one of 64, as arch/wgmma.cuh reads them, others as in memory. What lies
// outside the tensor becomes zeros.
struct TensorMapSpec {
  const void* base;  // 16-byte aligned
  DType dtype;
  int64_t sizes[4];
  int64_t strides[3];
  int panel, rows;
  bool reads_ahead = true;  // what is not in the L2 cache comes by 256 bytes, else by 128
  int planes = 1;
};

// With whole_rows the map has five dimensions, since rows are cut into panels, of which they must be multiples: panel,
// rows, panels, and the last two. A box has its rows' first panels, then their next ones.
//
// cudaErrorNotSupported without a driver that knows TMA, cudaErrorInvalidValue if the tensor cannot be described.
inline cudaError_t make_tensor_map(CUtensorMap* map, const TensorMapSpec& spec, bool whole_rows = false) {
  // The function is the driver's, which this library does not link to.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;

  const bool one_byte = spec.dtype == DType::kFloat8E4M3 || spec.dtype == DType::kInt8;
  const int element_bytes = one_byte ? 1 : spec.dtype == DType::kFloat32 ? 4 : 2;
  const CUtensorMapDataType type = one_byte                        ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : spec.dtype == DType::kFloat32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : spec.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int panel_bytes = spec.panel * element_bytes;
  const CUtensorMapSwizzle swizzle = panel_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : panel_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t sizes[5], strides[5];
  cuuint32_t box[5], rank = 0;
  const auto add = [&](int64_t size, int64_t stride, int64_t of_box) {
    sizes[rank] = static_cast<cuuint64_t>(size);
    // The stride of a dimension of one element may be anything, but must be valid.
    strides[rank] = size > 1 ? static_cast<cuuint64_t>(stride * element_bytes) : cuuint64_t{16};
    box[rank++] = static_cast<cuuint32_t>(of_box);
  };
  const int64_t num_panels = spec.sizes[0] / spec.panel;
  add(whole_rows ? spec.panel : spec.sizes[0], 1, spec.panel);
  add(spec.sizes[1], spec.strides[0], spec.rows);
  if (whole_rows) add(num_panels, spec.panel, num_panels);
  add(spec.sizes[2], spec.strides[1], spec.planes);
  add(spec.sizes[3], spec.strides[2], 1);
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =  // elements of the first dimension lie side by side: it has no stride
      encode(map, type, rank, const_cast<void*>(spec.base), sizes, strides + 1, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             spec.reads_ahead ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fastattn
