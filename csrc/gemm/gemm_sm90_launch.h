// The launcher templates of the Hopper GEMMs: declared here for the dispatch table, defined in gemm_sm90.cuh and
// gemm_sm90_few_rows.cuh, instantiated in gemm_*sm90_{*_rows,in_order}.cu, so that they compile in parallel.
#pragma once

#include "gemm/gemm_sm90.h"
#include "gemm/gemm_sm90_epilogue.cuh"
#include "gemm/gemm_sm90_operands.cuh"

namespace fastattn {

template <typename Operands, int BLOCK_M, int BLOCK_N, bool TURNS = false, typename Epilogue = GemmSm90Plain>
cudaError_t launch_gemm_sm90(const typename Epilogue::Params& params, cudaStream_t stream);
template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM, typename Epilogue = GemmSm90Plain>
cudaError_t launch_gemm_sm90_few_rows(const typename Epilogue::Params& params, cudaStream_t stream);
template <typename Operands, int BLOCK_M, int CTAS_PER_SM, typename Epilogue = GemmSm90Plain>
cudaError_t launch_gemm_sm90_in_order(const typename Epilogue::Params& params, cudaStream_t stream);

// Whole tables, for epilogues whose Params are their own.
cudaError_t launch_gemm_added_sm90_many_rows(const GemmSm90AddedParams& params, cudaStream_t stream);
cudaError_t launch_gemm_added_sm90_few_rows(const GemmSm90AddedParams& params, cudaStream_t stream);

}  // namespace fastattn
