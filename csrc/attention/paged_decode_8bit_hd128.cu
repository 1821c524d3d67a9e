// Instantiations of paged_decode for K and V of 8 bits, head dims padded to 128.
#include "attention/paged_decode.cuh"

namespace fastattn {

template cudaError_t launch_paged_decode<uint16_t, __nv_fp8_e4m3, 128, AttentionMask>(const PagedDecodeParams&,
                                                                                      cudaStream_t);
template cudaError_t launch_paged_decode<uint16_t, int8_t, 128, AttentionMask>(const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<uint16_t, __nv_fp8_e4m3, 128, TreeMask>(const PagedDecodeParams&,
                                                                                 cudaStream_t);
template cudaError_t launch_paged_decode<uint16_t, int8_t, 128, TreeMask>(const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<uint16_t, __nv_fp8_e4m3, 128, AttentionMask, true>(const PagedDecodeParams&,
                                                                                            cudaStream_t);
template cudaError_t launch_paged_decode<uint16_t, int8_t, 128, AttentionMask, true>(const PagedDecodeParams&,
                                                                                     cudaStream_t);

}  // namespace fastattn
