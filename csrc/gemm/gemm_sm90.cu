// Dispatch tables of the Hopper GEMMs.
#include "arch/dispatch.h"
#include "gemm/gemm_row_norms_sm90.h"
#include "gemm/gemm_sm90.h"
#include "gemm/gemm_sm90_launch.h"

namespace fastattn {
namespace {

struct Instantiation {
  GemmSm90Tile tile;
  cudaError_t (*launch)(const GemmSm90Params&, cudaStream_t);
};

template <typename Operands, int BLOCK_M, int BLOCK_N, bool TURNS = false, typename Epilogue = GemmSm90Plain>
constexpr Instantiation kManyRows = {{BLOCK_M, BLOCK_N, 1, TURNS},
                                     launch_gemm_sm90<Operands, BLOCK_M, BLOCK_N, TURNS, Epilogue>};
template <typename Operands, int BLOCK_M, int BLOCK_N, int CTAS_PER_SM, typename Epilogue>
constexpr Instantiation kFewRows = {{BLOCK_M, BLOCK_N, CTAS_PER_SM},
                                    launch_gemm_sm90_few_rows<Operands, BLOCK_M, BLOCK_N, CTAS_PER_SM, Epilogue>};

// Which exist: add a line here, in gemm_sm90_config.h, and its instantiation in gemm_*sm90_*_rows.cu.
template <typename Operands>
constexpr Instantiation kAllManyRows[] = {
    kManyRows<Operands, 64, 96>,   kManyRows<Operands, 64, 128>,        kManyRows<Operands, 64, 192>,
    kManyRows<Operands, 64, 224>,  kManyRows<Operands, 128, 96>,        kManyRows<Operands, 128, 128>,
    kManyRows<Operands, 128, 160>, kManyRows<Operands, 128, 192, true>, kManyRows<Operands, 128, 224>,
    kManyRows<Operands, 128, 256>, kManyRows<Operands, 192, 128>,       kManyRows<Operands, 192, 192>,
    kManyRows<Operands, 192, 224>};
template <typename Operands>
constexpr Instantiation kWideManyRows[] = {kManyRows<Operands, 128, 128, true>, kManyRows<Operands, 128, 192, true>,
                                           kManyRows<Operands, 128, 224>,       kManyRows<Operands, 128, 256>,
                                           kManyRows<Operands, 192, 128>,       kManyRows<Operands, 192, 192>,
                                           kManyRows<Operands, 192, 224>};
template <typename Operands>
constexpr Instantiation kTwoLevelsManyRows[] = {kManyRows<Operands, 128, 96>,        kManyRows<Operands, 128, 128>,
                                                kManyRows<Operands, 128, 192>,       kManyRows<Operands, 192, 128>,
                                                kManyRows<Operands, 128, 256, true>, kManyRows<Operands, 192, 192>};
template <typename Operands>
constexpr Instantiation kGatedManyRows[] = {
    kManyRows<Operands, 64, 192, false, GemmSm90Gated>,  kManyRows<Operands, 64, 256, false, GemmSm90Gated>,
    kManyRows<Operands, 128, 128, false, GemmSm90Gated>, kManyRows<Operands, 128, 192, false, GemmSm90Gated>,
    kManyRows<Operands, 128, 256, false, GemmSm90Gated>, kManyRows<Operands, 192, 128, false, GemmSm90Gated>,
    kManyRows<Operands, 192, 192, false, GemmSm90Gated>};
template <typename Operands>
constexpr Instantiation k8BitGatedManyRows[] = {
    kManyRows<Operands, 128, 128, false, GemmSm90Gated>, kManyRows<Operands, 128, 192, false, GemmSm90Gated>,
    kManyRows<Operands, 128, 256, false, GemmSm90Gated>, kManyRows<Operands, 192, 128, false, GemmSm90Gated>,
    kManyRows<Operands, 192, 192, false, GemmSm90Gated>};
template <typename Operands>
constexpr Instantiation kTwoLevelsGatedManyRows[] = {
    kManyRows<Operands, 128, 128, false, GemmSm90Gated>, kManyRows<Operands, 128, 192, false, GemmSm90Gated>,
    kManyRows<Operands, 192, 128, false, GemmSm90Gated>, kManyRows<Operands, 192, 192, false, GemmSm90Gated>};
template <typename Operands, typename Epilogue>
constexpr Instantiation kAllFewRows[] = {
    kFewRows<Operands, 8, 64, 2, Epilogue>,    kFewRows<Operands, 16, 64, 2, Epilogue>,
    kFewRows<Operands, 32, 64, 2, Epilogue>,   kFewRows<Operands, 64, 64, 2, Epilogue>,
    kFewRows<Operands, 64, 64, 1, Epilogue>,   kFewRows<Operands, 128, 64, 1, Epilogue>,
    kFewRows<Operands, 128, 128, 2, Epilogue>, kFewRows<Operands, 256, 128, 1, Epilogue>,
};

template <typename Operands, int BLOCK_M, int CTAS_PER_SM, typename Epilogue>
constexpr Instantiation kInOrder = {{BLOCK_M, 64, CTAS_PER_SM, false, true},
                                    launch_gemm_sm90_in_order<Operands, BLOCK_M, CTAS_PER_SM, Epilogue>};
template <typename Operands, typename Epilogue>
constexpr Instantiation kAllInOrder[] = {
    kInOrder<Operands, 8, 2, Epilogue>,  kInOrder<Operands, 8, 1, Epilogue>,  kInOrder<Operands, 16, 2, Epilogue>,
    kInOrder<Operands, 16, 1, Epilogue>, kInOrder<Operands, 32, 2, Epilogue>, kInOrder<Operands, 32, 1, Epilogue>,
    kInOrder<Operands, 64, 2, Epilogue>, kInOrder<Operands, 64, 1, Epilogue>, kInOrder<Operands, 128, 1, Epilogue>,
};

template <typename Operands>
constexpr Instantiation kBlocksManyRows[] = {kManyRows<Operands, 128, 128>, kManyRows<Operands, 128, 256, true>,
                                             kManyRows<Operands, 192, 128>};
template <typename Operands, typename Epilogue = GemmSm90Plain>
constexpr Instantiation kBlocksFewRows[] = {
    kFewRows<Operands, 8, 64, 2, Epilogue>,
    kFewRows<Operands, 16, 64, 2, Epilogue>,
    kFewRows<Operands, 32, 64, 2, Epilogue>,
    kFewRows<Operands, 64, 64, 2, Epilogue>,
};

template <int N>
cudaError_t launch_of(const Instantiation (&table)[N], const GemmSm90Params& params, cudaStream_t stream) {
  const GemmSm90Tile& wanted = params.config.tile;
  for (const Instantiation& entry : table) {
    if (entry.tile.block_m == wanted.block_m && entry.tile.block_n == wanted.block_n &&
        entry.tile.ctas_per_sm == wanted.ctas_per_sm && entry.tile.turns == wanted.turns &&
        entry.tile.in_order == wanted.in_order) {
      return entry.launch(params, stream);
    }
  }
  return cudaErrorInvalidValue;
}

// Of kinds of operands that have them: a norm's rows are summed up beside the products, in another order. Sums of int8
// are exact in any, and gates of e4m3 in order are two launches.
template <typename Operands, typename Epilogue>
constexpr bool kHasInOrder = Operands::kNorm == GemmSm90Norm::kNone && !(Operands::kScaled && Epilogue::kRows == 2) &&
                             !std::is_same_v<typename Operands::Sum, int32_t>;

template <typename FewRowsOperands, typename ManyRowsOperands = FewRowsOperands, typename Epilogue = GemmSm90Plain>
cudaError_t launch(const GemmSm90Params& params, cudaStream_t stream) {
  if constexpr (kHasInOrder<FewRowsOperands, Epilogue>) {
    if (params.config.tile.in_order) return launch_of(kAllInOrder<FewRowsOperands, Epilogue>, params, stream);
  }
  if (params.config.few_rows) return launch_of(kAllFewRows<FewRowsOperands, Epilogue>, params, stream);
  if constexpr (Epilogue::kRows == 2 && ManyRowsOperands::kTwoLevels) {
    return launch_of(kTwoLevelsGatedManyRows<ManyRowsOperands>, params, stream);
  } else if constexpr (Epilogue::kRows == 2 && ManyRowsOperands::kScaled) {
    return launch_of(k8BitGatedManyRows<ManyRowsOperands>, params, stream);
  } else if constexpr (Epilogue::kRows == 2) {
    return launch_of(kGatedManyRows<ManyRowsOperands>, params, stream);
  } else if constexpr (ManyRowsOperands::kTwoLevels) {
    return launch_of(kTwoLevelsManyRows<ManyRowsOperands>, params, stream);
  } else if constexpr (std::is_same_v<typename ManyRowsOperands::Element, __nv_fp8_e4m3>) {
    return launch_of(kWideManyRows<ManyRowsOperands>, params, stream);
  } else {
    return launch_of(kAllManyRows<ManyRowsOperands>, params, stream);
  }
}

// Behind the kernel that gives its rows' norms, if it is to have them.
template <typename Operands, typename Epilogue = GemmSm90Plain>
cudaError_t launch_normed(const GemmSm90Params& params, cudaStream_t stream) {
  if (params.config.num_row_norms > 0) {
    const cudaError_t error = gemm_row_norms_sm90(params, Operands::kNorm, stream);
    if (error != cudaSuccess) return error;
  }
  return launch<Operands, Operands, Epilogue>(params, stream);
}

}  // namespace

cudaError_t gemm_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) { return launch<GemmSm90Dense<decltype(type)>>(params, stream); });
}

cudaError_t gemm_rms_norm_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return launch_normed<GemmSm90Normed<decltype(type), GemmSm90Norm::kRms>>(params, stream);
  });
}

cudaError_t gemm_gated_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using Operands = GemmSm90Dense<decltype(type)>;
    return launch<Operands, Operands, GemmSm90Gated>(params, stream);
  });
}

cudaError_t gemm_rms_norm_gated_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return launch_normed<GemmSm90Normed<decltype(type), GemmSm90Norm::kRms>, GemmSm90Gated>(params, stream);
  });
}

cudaError_t gemm_added_sm90(const GemmSm90AddedParams& params, cudaStream_t stream) {
  return params.config.few_rows ? launch_gemm_added_sm90_few_rows(params, stream)
                                : launch_gemm_added_sm90_many_rows(params, stream);
}

cudaError_t gemm_layer_norm_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return launch_normed<GemmSm90Normed<decltype(type), GemmSm90Norm::kLayer>>(params, stream);
  });
}

cudaError_t gemm_int8_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) { return launch<GemmSm90Int8<decltype(type)>>(params, stream); });
}

cudaError_t gemm_gated_int8_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using Operands = GemmSm90Int8<decltype(type)>;
    return launch<Operands, Operands, GemmSm90Gated>(params, stream);
  });
}

cudaError_t gemm_fp8_blocks_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using Operands = GemmSm90Fp8Blocks<decltype(type)>;
    return params.config.few_rows ? launch_of(kBlocksFewRows<Operands>, params, stream)
                                  : launch_of(kBlocksManyRows<Operands>, params, stream);
  });
}

cudaError_t gemm_fp8_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using InTwoLevels = GemmSm90Fp8<decltype(type), false>;
    return params.fast_accum ? launch<InTwoLevels, GemmSm90Fp8<decltype(type), true>>(params, stream)
                             : launch<InTwoLevels>(params, stream);
  });
}

cudaError_t gemm_gated_fp8_sm90(const GemmSm90Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using InTwoLevels = GemmSm90Fp8<decltype(type), false>;
    using InOne = GemmSm90Fp8<decltype(type), true>;
    return params.fast_accum ? launch<InTwoLevels, InOne, GemmSm90Gated>(params, stream)
                             : launch<InTwoLevels, InTwoLevels, GemmSm90Gated>(params, stream);
  });
}

}  // namespace fastattn
