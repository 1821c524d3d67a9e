// Sizes of the kernel for a decoder's layers (decode_layers_sm90.cuh), and where everything stands in the workspace and
// in shared memory. Made on the host.
#pragma once

#include <cstdint>

#include "decoder/decode_layers_sm90.h"

namespace fastattn {
namespace {

constexpr int kWarps = 8;  // that compute
constexpr int kThreads = 32 * kWarps;
// With a warp group of which one warp copies, and that leaves its registers to the others: with a lone warp more the
// eight would have 168, as some of the SM's four parts would hold three warps.
constexpr int kComputeRegisters = 232, kCopyRegisters = 40;
constexpr int kUnit = 8;  // rows of weight
constexpr int kStageColumns = 1024;
constexpr int kPieces = kStageColumns / 32 / kWarps;  // of 32 columns, of a warp
constexpr int kStagePitch = 2 * kStageColumns + 64;   // bytes; an odd multiple of 64 keeps rows apart in the banks
constexpr int kStageBytes = kUnit * kStagePitch;
constexpr int kMaxStages = 12;
// Of weights in tiles of 16 rows and 64 columns (gemm_sm90_w4_tiles.cuh), NVFP4: a stage's tiles and their scales.
constexpr int kTileRows = 16, kTileColumns = 64, kTileBytes = 512, kTileScaleBytes = 64;
constexpr int kStageTiles = 32;
constexpr int kTileWarps = 16;  // eight more, that help
// Of 640 threads that begin with 96.
constexpr int kTiledComputeRegisters = 152, kHelperRegisters = 72, kTiledCopyRegisters = 32;
constexpr int kTiledStageBytes = kStageTiles * (kTileBytes + kTileScaleBytes);
static_assert(kTiledStageBytes >= kStageBytes);  // a head has 16 bits
constexpr int kSlots = 3;                        // units whose sums meet at a time
constexpr int kBlocks = 2;                       // of kStageColumns columns, that are received at a time
constexpr int kOwnUnits = 16;                    // of the residual stream, of a CTA; half as many of tiles
constexpr int kMaxSplits = 32;                   // of a token's keys
constexpr int kStepKeys = 16;                    // of a warp at a time
// Steps whose K, and of 64 dims V, a warp brings before the queries are there: as many as its registers hold.
__host__ __device__ constexpr int early_steps(int head_dim) { return head_dim == 64 ? 2 : 1; }
constexpr int kKnownKeys = 128;  // of a warp: where they are it looks up once for all layers if there are no more
constexpr int kSmemBytes = 227 * 1024;
constexpr int kComputeBarrier = 1, kHelperBarrier = 2;

// Products of a layer, in their order, and one behind them all.
enum { kQkv, kOut, kGateUp, kDown, kHead, kNumProducts };

// Bytes from row to row of what is multiplied.
__host__ __device__ constexpr int x_pitch(int columns) { return 2 * columns + 64; }

struct Sizes {
  int n, i, heads, kv_heads, head_dim, group, qkv_rows, out_columns, splits, block_shift;
  bool has_bias, has_head_norms;
  float inverse_n;
  Sizes(const DecodeLayersParams& p, int ctas)
      : n(p.hidden_size),
        i(p.intermediate_size),
        heads(p.num_heads),
        kv_heads(p.num_kv_heads),
        head_dim(p.head_dim),
        group(p.num_heads / p.num_kv_heads),
        qkv_rows((p.num_heads + 2 * p.num_kv_heads) * p.head_dim),
        out_columns(p.num_heads * p.head_dim) {
    splits = ctas / (p.num_tokens * kv_heads);
    if (splits > kMaxSplits) splits = kMaxSplits;
    has_bias = p.layers[0].qkv_bias != nullptr;
    has_head_norms = p.layers[0].q_norm != nullptr;
    block_shift = 0;
    while (1 << block_shift < p.block_size) ++block_shift;
    inverse_n = 1.0f / static_cast<float>(n);
  }
};

// All of them must have a row of gates.
inline int decode_num_ctas(const DecodeLayersParams& p) {
  const int items = p.intermediate_size / (p.tiles == nullptr ? kUnit : kTileRows);
  return p.num_sms < items ? p.num_sms : items;
}

// Words from the workspace's beginning, all multiples of 4, so that marks are where marks are whatever the number of
// tokens.
struct Buffers {
  int32_t q, p, a, o, g, d, end;
  explicit Buffers(const Sizes& s) {
    q = 4;
    p = q + kDecodeMaxTokens * s.qkv_rows;
    a = p + kDecodeMaxTokens * s.heads * kMaxSplits * (s.head_dim / 2 + 1) * 4;
    o = a + kDecodeMaxTokens * s.out_columns;
    g = o + kDecodeMaxTokens * s.n;
    d = g + kDecodeMaxTokens * s.i;
    end = d + kDecodeMaxTokens * s.n;
  }
};

// A product of each layer: what it multiplies, (tokens, columns) from `buffer` on, and how many items of kUnit rows, or
// of a row of tiles (of gates and ups one of each). Short ones are handed over kSlots at a time, long ones and tiles
// one by one, so that what comes next can begin. The first item is the CTA `first`'s, the next that of the next: those
// with one more are others each time.
struct Product {
  int columns, items, buffer, first;
};

// Shared memory, bytes from its beginning.
struct Layout {
  int stages, x, sums, squares, own, heads, angles, rows, part, partial, merged, barriers, ring, end;
  Layout(const Sizes& s, int tokens, bool in_tiles) {
    int widest = s.i > s.out_columns ? s.i : s.out_columns;
    if (s.n > widest) widest = s.n;
    x = 0;
    sums = x + tokens * x_pitch(widest);
    squares = in_tiles ? sums : sums + 2 * kSlots * kWarps * tokens * kUnit * 4;
    own = squares + kWarps * kDecodeMaxTokens * 4;
    heads = own + kOwnUnits * kDecodeMaxTokens * kUnit * 2;   // of q, then the token's key and value
    angles = heads + (kDecodeMaxGroup + 2) * s.head_dim * 2;  // cosines and sines of the token's position
    rows = angles + s.head_dim * 4;
    part = rows + kWarps * kKnownKeys * 4;
    partial = part + 64;
    merged = partial + kWarps * kDecodeMaxGroup * (s.head_dim + 4) * 4;
    barriers = merged + kWarps * s.head_dim * 4;
    if (in_tiles) {  // where attention, which has no products beside it, has its parts
      sums = partial;
      const int end_of_sums = sums + 2 * kTileWarps * tokens * 2 * kTileRows * 4;
      if (barriers < end_of_sums) barriers = end_of_sums;
    }
    ring = (barriers + 2 * kMaxStages * 8 + 127) / 128 * 128;
    const int stage_bytes = in_tiles ? kTiledStageBytes : kStageBytes;
    stages = (kSmemBytes - ring) / stage_bytes;
    if (stages > kMaxStages) stages = kMaxStages;
    end = ring + stages * stage_bytes;
  }
};

// What does not change in a launch, made on the host: read from constant memory it takes no registers.
struct Args {
  DecodeLayersParams p;
  Sizes sizes;
  Buffers buffers;
  Layout layout;
  Product products[kNumProducts];
  Args(const DecodeLayersParams& params, int ctas)
      : p(params), sizes(params, ctas), buffers(sizes), layout(sizes, params.num_tokens, params.tiles != nullptr) {
    const bool in_tiles = params.tiles != nullptr;
    const int unit = in_tiles ? kTileRows : kUnit, n = sizes.n / unit;
    const int gates_and_ups = in_tiles ? sizes.i / unit : 2 * sizes.i / unit;
    products[kQkv] = {sizes.n, sizes.qkv_rows / unit, buffers.d, (n + gates_and_ups) % ctas};
    products[kOut] = {sizes.out_columns, n, buffers.a, 0};  // as of down: the same rows of the residual stream
    products[kGateUp] = {sizes.n, gates_and_ups, buffers.o, n % ctas};
    products[kDown] = {sizes.i, n, buffers.g, 0};
    products[kHead] = {sizes.n, p.vocab_size / kUnit, buffers.d, n % ctas};
  }
};

struct TiledArgs : Args {
  DecodeLayerTiles tiles[kDecodeMaxLayers];
  TiledArgs(const DecodeLayersParams& params, int ctas) : Args(params, ctas) {
    for (int i = 0; i < params.num_layers; ++i) tiles[i] = params.tiles[i];
  }
};

}  // namespace
}  // namespace fastattn
