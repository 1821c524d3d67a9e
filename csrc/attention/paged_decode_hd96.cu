// Instantiations of paged_decode for head dims padded to 96.
#include "attention/paged_decode.cuh"

namespace fastattn {

template cudaError_t launch_paged_decode<__nv_bfloat16, __nv_bfloat16, 96, AttentionMask>(const PagedDecodeParams&,
                                                                                          cudaStream_t);
template cudaError_t launch_paged_decode<__half, __half, 96, AttentionMask>(const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<__nv_bfloat16, __nv_bfloat16, 96, TreeMask>(const PagedDecodeParams&,
                                                                                     cudaStream_t);
template cudaError_t launch_paged_decode<__half, __half, 96, TreeMask>(const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<__nv_bfloat16, __nv_bfloat16, 96, AttentionMask, true>(
    const PagedDecodeParams&, cudaStream_t);
template cudaError_t launch_paged_decode<__half, __half, 96, AttentionMask, true>(const PagedDecodeParams&,
                                                                                  cudaStream_t);

}  // namespace fastattn
