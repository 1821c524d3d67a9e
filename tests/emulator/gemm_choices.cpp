// What the host does for a product on Hopper: a configuration is chosen, the dispatch table has an instance of it, the
// driver describes its operands, and a grid is launched. All of it is the sources' own, but for the grid, which nobody
// runs: kernels are compiled without bodies. Each configuration must have an instance, fit into an SM, and give each
// part of each sum to one CTA. Prints how many there were, or the first one that is wrong.
#include <stdexcept>

#include "device.h"
#undef __CUDA_ARCH_FEAT_SM90_ALL

#include "gemm/gemm_added_sm90_few_rows.cu"
#include "gemm/gemm_added_sm90_many_rows.cu"
#include "gemm/gemm_row_norms_sm90.cu"
#include "gemm/gemm_sampled_sm90_few_rows.cu"
#include "gemm/gemm_sm90.cu"
#include "gemm/gemm_sm90_w4_fours_tiles.cu"
#include "gemm/gemm_sm90_w4_fp8_tiles.cu"
#include "gemm/gemm_sm90_w4_int4_some_rows.cu"
#include "gemm/gemm_sm90_w4_int4_tiles.cu"
#include "gemm/gemm_sm90_w4_mxfp4_some_rows.cu"
#include "gemm/gemm_sm90_w4_mxfp4_tiles.cu"
#include "gemm/gemm_sm90_w4_nvfp4_some_rows.cu"
#include "gemm/gemm_sm90_w4_nvfp4_tiles.cu"

namespace emulator {
namespace {

struct Launched {
  int64_t num_ctas;
  int cluster_size, num_threads, smem_bytes;
} launched;

}  // namespace

void fail(const std::string& what) { throw std::runtime_error(what); }

void run_grid(int64_t num_ctas, int cluster_size, int num_threads, int num_smem_bytes, std::function<void()>) {
  launched = {num_ctas, cluster_size, num_threads, num_smem_bytes};
}

}  // namespace emulator

namespace fastattn {
namespace {

using emulator::launched;
using Norm = GemmSm90Norm;

constexpr int64_t kSmBytes = 228 * 1024, kCtaBytes = 227 * 1024, kReservedBytes = 1024;  // of shared memory

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// ---------------------------------------------------------------------------------------------
// Calls

struct Call {
  int64_t m, n, k, num_sms;
  DType dtype;
};

std::string text_of(const Call& call) {
  return "m " + std::to_string(call.m) + ", n " + std::to_string(call.n) + ", k " + std::to_string(call.k) + " on " +
         std::to_string(call.num_sms) + " SMs";
}

// Any aligned address: nobody reads there.
void* somewhere() {
  alignas(128) static char place[128];
  return place;
}

template <typename Params>
void describe(Params& p, const Call& call) {
  p.x = p.weight = p.bias = p.out = somewhere();
  p.m = call.m;
  p.n = call.n;
  p.k = call.k;
  p.x_stride = call.k;
  p.dtype = call.dtype;
}

template <typename Params>
Params params_of(const Call& call, const GemmSm90Config& config) {
  Params p;
  describe(p, call);
  p.weight_stride = call.k;
  p.config = config;
  return p;
}

// ---------------------------------------------------------------------------------------------
// Both kernels of gemm_sm90.h

// An operator as csrc/torch asks for it: its problem but for the sizes, and what launches it.
struct Kind {
  const char* name;
  GemmSm90Problem problem;
  cudaError_t (*launch)(const Call&, const GemmSm90Config&);
  bool (*streams)(const GemmSm90Tile&);  // whether the instance can share tiles
  int64_t most_rows = INT64_MAX;
};

template <cudaError_t (*LAUNCH)(const GemmSm90Params&, cudaStream_t), bool FAST_ACCUM = false, bool GIVEN = false>
cudaError_t launch_plain(const Call& call, const GemmSm90Config& config) {
  auto p = params_of<GemmSm90Params>(call, config);
  p.fast_accum = FAST_ACCUM;
  if (GIVEN) p.x_squares = static_cast<const float*>(somewhere());
  return LAUNCH(p, nullptr);
}
template <typename Params, cudaError_t (*LAUNCH)(const Params&, cudaStream_t)>
cudaError_t launch_with(const Call& call, const GemmSm90Config& config) {
  return LAUNCH(params_of<Params>(call, config), nullptr);
}

template <typename Operands, typename Epilogue = GemmSm90Plain, size_t IDX = 0>
bool streams(const GemmSm90Tile& tile) {
  if constexpr (IDX < std::size(kGemmSm90Tiles)) {
    constexpr GemmSm90Tile kTile = kGemmSm90Tiles[IDX];
    if (tile.block_m != kTile.block_m || tile.block_n != kTile.block_n || tile.turns != kTile.turns) {
      return streams<Operands, Epilogue, IDX + 1>(tile);
    }
    return kGemmSm90Streams<Operands, kTile.block_m, kTile.block_n, kTile.turns, Epilogue>;
  }
  return false;
}

using Dense = GemmSm90Dense<__half>;
using Int8 = GemmSm90Int8<__half>;
using Fp8 = GemmSm90Fp8<__half, false>;
using FastFp8 = GemmSm90Fp8<__half, true>;
template <Norm NORM>
using Normed = GemmSm90Normed<__half, NORM>;

const Kind kKinds[] = {
    {"linear", {}, launch_plain<gemm_sm90>, streams<Dense>},
    {"linear in order", {.in_order = true}, launch_plain<gemm_sm90>, streams<Dense>},
    {"linear_add", {.added = true}, launch_with<GemmSm90AddedParams, gemm_added_sm90>, streams<Dense, GemmSm90Added>},
    {"lm_head_sample",
     {},
     launch_with<GemmSm90SampledParams, gemm_sampled_sm90>,
     streams<Dense>,
     kGemmSm90MostSampledRows},
    {"rms_norm_linear", {.norm = Norm::kRms}, launch_plain<gemm_rms_norm_sm90>, streams<Normed<Norm::kRms>>},
    {"rms_norm_linear of squares",
     {.norm = Norm::kRmsGiven},
     launch_plain<gemm_rms_norm_sm90, false, true>,
     streams<Normed<Norm::kRms>>},
    {"layer_norm_linear", {.norm = Norm::kLayer}, launch_plain<gemm_layer_norm_sm90>, streams<Normed<Norm::kLayer>>},
    {"gated_linear", {.gated = true}, launch_plain<gemm_gated_sm90>, streams<Dense, GemmSm90Gated>},
    {"gated_linear in order",
     {.gated = true, .in_order = true},
     launch_plain<gemm_gated_sm90>,
     streams<Dense, GemmSm90Gated>},
    {"rms_norm_gated_linear",
     {.norm = Norm::kRms, .gated = true},
     launch_plain<gemm_rms_norm_gated_sm90>,
     streams<Normed<Norm::kRms>, GemmSm90Gated>},
    {"rms_norm_gated_linear of squares",
     {.norm = Norm::kRmsGiven, .gated = true},
     launch_plain<gemm_rms_norm_gated_sm90, false, true>,
     streams<Normed<Norm::kRms>, GemmSm90Gated>},
    {"int8_linear", {.element_bytes = 1}, launch_plain<gemm_int8_sm90>, streams<Int8>},
    {"int8_linear with zero points",
     {.element_bytes = 1, .zero_points = true},
     launch_plain<gemm_int8_sm90>,
     streams<Int8>},
    {"gated int8_linear",
     {.element_bytes = 1, .gated = true},
     launch_plain<gemm_gated_int8_sm90>,
     streams<Int8, GemmSm90Gated>},
    {"gated int8_linear with zero points",
     {.element_bytes = 1, .gated = true, .zero_points = true},
     launch_plain<gemm_gated_int8_sm90>,
     streams<Int8, GemmSm90Gated>},
    {"fp8_linear", {.element_bytes = 1, .two_levels = true}, launch_plain<gemm_fp8_sm90>, streams<Fp8>},
    {"fp8_linear in order",
     {.element_bytes = 1, .two_levels = true, .in_order = true},
     launch_plain<gemm_fp8_sm90>,
     streams<Fp8>},
    {"fp8_linear, fast_accum",
     {.element_bytes = 1, .fast_accum = true},
     launch_plain<gemm_fp8_sm90, true>,
     streams<FastFp8>},
    {"gated fp8_linear",
     {.element_bytes = 1, .two_levels = true, .gated = true},
     launch_plain<gemm_gated_fp8_sm90>,
     streams<Fp8, GemmSm90Gated>},
    {"gated fp8_linear, fast_accum",
     {.element_bytes = 1, .gated = true, .fast_accum = true},
     launch_plain<gemm_gated_fp8_sm90, true>,
     streams<FastFp8, GemmSm90Gated>},
    {"fp8_block_linear",
     {.element_bytes = 1, .two_levels = true, .block_scales = true},
     launch_plain<gemm_fp8_blocks_sm90>,
     streams<GemmSm90Fp8Blocks<__half>>},
};

// Whether count parts of `size` each, one behind the other, have all of `all`, and none of them has nothing.
bool covers(int64_t count, int64_t size, int64_t all) { return count * size >= all && (count - 1) * size < all; }

void check_few_rows(const GemmSm90Problem& problem, const GemmSm90Config& c) {
  const GemmSm90FewRowsRing ring = gemm_sm90_few_rows_ring(c.tile);
  const int64_t num_steps = ceil_div(problem.num_panels(), ring.panels);
  require(c.rows >= 1 && c.rows <= c.tile.block_m && covers(c.m_tiles, c.rows, problem.m), "rows of x");
  require(c.weight_rows <= c.tile.block_n && covers(c.n_tiles, c.weight_rows, problem.n), "rows of weight");
  require(c.weight_rows % (problem.gated ? 16 : 8) == 0, "rows of weight that are no whole eights");
  require(c.weight_rows == c.tile.block_n || problem.plain() || problem.in_order, "rows of weight are shared out");
  require(!problem.added || c.weight_rows % kGemmSm90SquaresPart == 0, "rows of weight that share a sum of squares");
  require(c.num_splits >= 1 && c.num_splits <= num_steps, "a CTA without a stage");
  require(!problem.in_order || c.num_splits == 1, "K is split");
  require(launched.num_ctas == c.m_tiles * c.n_tiles * c.num_splits && launched.cluster_size == c.num_splits, "grid");
}

// That the clusters' walks have every stage of every tile once.
void check_walk(int32_t num_tiles, int32_t num_stages, bool stream_k, int32_t num_clusters) {
  std::vector<int32_t> stages_of(num_tiles, 0);
  int32_t before = 0;
  for (int32_t cluster = 0; cluster < num_clusters; ++cluster) {
    const auto walk = GemmSm90Walk::make(num_tiles, num_stages, stream_k, cluster, num_clusters);
    require(walk.num_parts >= 1, "a cluster without a tile");
    for (int32_t part = 0; part < walk.num_parts; ++part) {
      const int32_t tile = walk.tile(part), begin = walk.begin(part), end = walk.end(part);
      require(tile >= 0 && tile < num_tiles && begin >= 0 && begin < end && end <= num_stages, "a part of no tile");
      // What is handed on has the place of one tile, and a mark.
      require(end == num_stages || part == 0, "a cluster that hands on more than one tile");
      stages_of[tile] += end - begin;
    }
    if (!stream_k) continue;
    const int32_t begin = GemmSm90Walk::run_begin(num_tiles * num_stages, cluster, num_clusters);
    require(begin == before, "runs that do not meet");
    before = GemmSm90Walk::run_begin(num_tiles * num_stages, cluster + 1, num_clusters);
  }
  for (const int32_t stages : stages_of) require(stages == num_stages, "a tile has not all of its stages once");
}

void check_many_rows(const Kind& kind, const GemmSm90Problem& problem, const GemmSm90Config& c) {
  constexpr int64_t kMostTilesWalked = 3000;
  const int64_t num_tiles = c.m_tiles * c.n_tiles, num_stages = problem.num_panels();
  require(c.rows >= 1 && c.rows <= c.tile.block_m && covers(c.m_tiles, 2 * c.rows, problem.m), "rows of x");
  require(c.weight_rows == c.tile.block_n && covers(c.n_tiles, c.tile.block_n, problem.n), "rows of weight");
  require(c.group_rows >= 1 && c.group_rows <= c.m_tiles, "groups of tiles");
  require(c.num_ctas % 2 == 0 && c.num_ctas <= std::max<int64_t>(2, problem.num_sms), "CTAs that do not run at once");
  require(launched.num_ctas == c.num_ctas && launched.cluster_size == 2, "grid");
  require(num_tiles <= INT32_MAX, "tiles that are not counted");
  const bool beside = problem.norm != Norm::kNone && gemm_sm90_leaves_room(c.tile);
  require(!beside || launched.smem_bytes + 2 * kReservedBytes <= kSmBytes, "no room for a CTA that gives norms");
  require(c.stream_k || c.num_ctas <= 2 * num_tiles, "clusters without a tile");
  if (c.stream_k) {
    require(!problem.in_order, "tiles are shared, out of order");
    require(kind.streams(c.tile), "tiles are shared, by an instance that does not");
    require(num_tiles * num_stages <= INT32_MAX, "stages that are not counted");
    const int64_t sums_of_cta = c.tile.block_m * c.tile.block_n;
    require(c.num_sums() == c.num_ctas * sums_of_cta && c.num_marks() == 2 * c.num_ctas, "workspaces");
  }
  if (num_tiles <= kMostTilesWalked) {
    check_walk(static_cast<int32_t>(num_tiles), static_cast<int32_t>(num_stages), c.stream_k,
               static_cast<int32_t>(c.num_ctas / 2));
  }
}

void check(const Kind& kind, const Call& call) {
  GemmSm90Problem problem = kind.problem;
  problem.m = call.m;
  problem.n = call.n;
  problem.k = call.k;
  problem.num_sms = call.num_sms;
  const GemmSm90Config config = gemm_sm90_config(problem);
  // Of a head that draws `linear` has the product where its choice is of many rows (lm_head_sample in torch/gemm.cpp).
  if (kind.most_rows == kGemmSm90MostSampledRows && !config.few_rows) return;
  try {
    launched = {};
    require(kind.launch(call, config) == cudaSuccess, "no instance");
    require(launched.num_threads <= 1024 && launched.num_threads % 32 == 0, "threads");
    require(launched.smem_bytes <= kCtaBytes, "a CTA has more shared memory than there is");
    require(config.tile.ctas_per_sm * (launched.smem_bytes + kReservedBytes) <= kSmBytes, "CTAs do not share an SM");
    require(config.num_ctas <= INT32_MAX, "more CTAs than a grid has");
    config.few_rows ? check_few_rows(problem, config) : check_many_rows(kind, problem, config);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(kind.name) + ", " + text_of(call) + ": " + error.what() + " (" +
                             (config.few_rows ? "few rows, " : "many rows, ") + std::to_string(config.tile.block_m) +
                             " x " + std::to_string(config.tile.block_n) + (config.tile.turns ? " in turns" : "") +
                             (config.tile.in_order ? " in order" : "") + (config.stream_k ? ", stream-K" : "") + ", " +
                             std::to_string(config.num_splits) + " splits, " + std::to_string(config.num_ctas) +
                             " CTAs)");
  }
}

// ---------------------------------------------------------------------------------------------
// Weights of 4 bits in tiles

struct TilesKind {
  const char* name;
  cudaError_t (*some_rows)(const GemmSm90W4Params&, const GemmSm90W4SomeRowsConfig&, cudaStream_t);
  cudaError_t (*few_rows)(const GemmSm90W4Params&, const GemmSm90W4TilesConfig&, cudaStream_t);
  int64_t most_rows;  // of x; beyond them other kernels have the call
};

const TilesKind kTilesKinds[] = {
    {"int4_linear", gemm_int4_some_rows_sm90, gemm_int4_tiles_sm90, 64},
    {"fp4_linear of NVFP4", gemm_nvfp4_some_rows_sm90, gemm_nvfp4_tiles_sm90, 64},
    {"fp4_linear of MXFP4", gemm_mxfp4_some_rows_sm90, gemm_mxfp4_tiles_sm90, 64},
    {"fp4_linear of NVFP4 in order 8", nullptr, gemm_nvfp4_tiles_of_fours_sm90, kMostRowsOfFours},
    {"fp4_linear of MXFP4 in order 8", nullptr, gemm_mxfp4_tiles_of_fours_sm90, kMostRowsOfFours},
    {"fp4_linear_fp8 of NVFP4", nullptr, gemm_nvfp4_fp8_tiles_sm90, 16},
    {"fp4_linear_fp8 of MXFP4", nullptr, gemm_mxfp4_fp8_tiles_sm90, 16},
};

// Clusters have runs of `all` rows of tiles or blocks, a CTA at most `most` of them; and their CTAs of K's parts.
void check_runs(int64_t num_clusters, int64_t all, int64_t most) {
  require(num_clusters >= 1 && num_clusters <= all, "clusters without a row of tiles");
  require(ceil_div(all, num_clusters) <= most, "a cluster that has more rows of tiles than places");
  require(num_clusters * all <= INT32_MAX, "runs of rows of tiles are not counted in 32 bits");
}

void check(const TilesKind& kind, const Call& call) {
  GemmSm90W4Params p;
  describe(p, call);
  p.weight_scale = somewhere();
  p.group_size = FastDivide(static_cast<int32_t>(call.k));
  const int64_t row_tiles = call.n / 16, column_tiles = call.k / 64;
  GemmSm90W4SomeRowsConfig some = {};
  if (kind.some_rows != nullptr) some = gemm_sm90_w4_some_rows_config(call.m, call.n, call.k, call.num_sms);
  try {
    launched = {};
    if (some.num_ctas > 0) {
      const int cluster_size = some.num_splits * kGemmSm90W4SomeRowsSharers;
      require(kind.some_rows(p, some, nullptr) == cudaSuccess, "no instance");
      require(some.block_m >= call.m, "rows of x");
      require(some.num_splits <= ceil_div(column_tiles, 4), "a CTA without a stage");
      require(launched.num_ctas == some.num_ctas && launched.cluster_size == cluster_size, "grid");
      check_runs(some.num_ctas / cluster_size, row_tiles, kGemmSm90W4SomeRowsSharers * some.box_tiles);
      require(some.box_tiles <= kGemmSm90W4SomeRowsTiles, "a CTA has more rows of tiles than warps");
    } else {
      const GemmSm90W4TilesConfig few = gemm_sm90_w4_tiles_config(call.m, call.n, call.k, call.num_sms);
      if (few.num_ctas == 0) {  // for the kernel for many rows, or an error
        require(call.n > 2'000'000, "nobody takes it");
        return;
      }
      require(kind.few_rows(p, few, nullptr) == cudaSuccess, "no instance");
      require(few.shape.block_m >= call.m, "rows of x");
      require(few.num_splits <= column_tiles, "a CTA without a tile");
      require(launched.num_ctas == few.num_ctas && launched.cluster_size == few.num_splits, "grid");
      check_runs(few.num_ctas / few.num_splits, ceil_div(row_tiles, few.shape.row_tiles), few.shape.max_blocks);
    }
    require(launched.cluster_size <= 8 && launched.num_ctas % launched.cluster_size == 0, "clusters");
    require(launched.smem_bytes <= kCtaBytes, "a CTA has more shared memory than there is");
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(kind.name) + ", " + text_of(call) + ": " + error.what());
  }
}

// ---------------------------------------------------------------------------------------------
// Which calls

constexpr int64_t kSms[] = {132, 114, 144,
                            78,  16,  2};  // H100 and H200, H100 PCIe, all of a die, H20, and slices of one
constexpr int64_t kModels[][2] = {{576, 576},    {1536, 576},    {6144, 4096},   {4096, 4096},  {28672, 4096},
                                  {4096, 14336}, {8192, 8192},   {10240, 8192},  {57344, 8192}, {8192, 28672},
                                  {49152, 576},  {128256, 4096}, {151936, 1024}, {16, 64},      {1152, 4304}};

struct Draws {
  std::mt19937 engine{1};
  int64_t between(int64_t low, int64_t high) {  // small numbers as often as large ones
    const double size =
        std::uniform_real_distribution<double>(0.0, std::log(static_cast<double>(high - low + 1)))(engine);
    return low + static_cast<int64_t>(std::exp(size)) - 1;
  }
};

// Every number of rows up to where the kernels for few end, in the layers of models; and others, by chance.
template <typename Check>
int64_t check_calls(int64_t most_rows, int64_t unit_n, int64_t unit_k, Check check) {
  constexpr int kDrawn = 6000;
  int64_t count = 0;
  const auto call = [&](int64_t m, int64_t n, int64_t k, int64_t num_sms) {
    check(Call{m, ceil_div(n, unit_n) * unit_n, ceil_div(k, unit_k) * unit_k, num_sms,
               count % 2 == 0 ? DType::kBFloat16 : DType::kFloat16});
    ++count;
  };
  for (const auto& [n, k] : kModels) {
    for (int64_t m = 1; m <= std::min<int64_t>(most_rows, 300); ++m) call(m, n, k, kSms[m % 3]);
    for (int64_t m = 320; m <= std::min<int64_t>(most_rows, 20000); m += m / 5) call(m, n, k, kSms[m % 3]);
  }
  Draws draws;
  for (int i = 0; i < kDrawn; ++i) {
    call(draws.between(1, std::min<int64_t>(most_rows, 100000)), draws.between(1, 300000), draws.between(1, 60000),
         kSms[i % std::size(kSms)]);
  }
  return count;
}

}  // namespace
}  // namespace fastattn

int main() {
  using namespace fastattn;
  int64_t count = 0;
  try {
    for (const Kind& kind : kKinds) {
      count += check_calls(kind.most_rows, kind.problem.gated ? 16 : 8, 16 / kind.problem.element_bytes,
                           [&](const Call& call) { check(kind, call); });
    }
    for (const TilesKind& kind : kTilesKinds) {
      count += check_calls(kind.most_rows, 16, 64, [&](const Call& call) { check(kind, call); });
      for (const int64_t m : {1, 9, 16}) {
        for (int64_t n = 1'000'000; n < INT32_MAX; n += n / 7) check(kind, {m, n / 16 * 16, 64, 132, DType::kFloat16});
      }
    }
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("%lld configurations\n", static_cast<long long>(count));
}
