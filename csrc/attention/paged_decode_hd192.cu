// Instantiations of paged_decode for head dims padded to 192.
#include "attention/paged_decode.cuh"

namespace fastattn {

template cudaError_t launch_paged_decode<__nv_bfloat16, __nv_bfloat16, 192, AttentionMask>(const PagedDecodeParams&,
                                                                                           cudaStream_t);
template cudaError_t launch_paged_decode<__half, __half, 192, AttentionMask>(const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<__nv_bfloat16, __nv_bfloat16, 192, TreeMask>(const PagedDecodeParams&,
                                                                                      cudaStream_t);
template cudaError_t launch_paged_decode<__half, __half, 192, TreeMask>(const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<__nv_bfloat16, __nv_bfloat16, 192, AttentionMask, true>(
    const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<__half, __half, 192, AttentionMask, true>(const PagedDecodeParams&,
                                                                                   cudaStream_t);

}  // namespace fastattn
