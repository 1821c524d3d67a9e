// Copies blocks of many caches: keys, values and scales of all layers, a launch for all of them.
//
//   target[c][to, t, :, :] = source[c][from, t, :, :]    t < num_tokens[pair]    (from, to) = block_mapping[pair]
//
//   source[c] (blocks, block_size, rows, row_bytes), target[c] the same of its own blocks; bytes, whatever they mean.
//   Either side may be pinned host memory, which the kernel then reads or writes over PCIe.
//
// An item is a piece of kPieceUnits units of one block of one cache, the pieces of a block one after the other. A unit
// is what a thread moves at a time: 16 bytes where all addresses allow it, else 4 or 1. A CTA loads all of its piece
// before it stores: kLoads units of each thread are on their way at a time, which is what hides the memory's latency,
// and all the more PCIe's.
//
//   pair 0: [cache 0: piece 0 | piece 1 | …] [cache 1: …] …   pair 1: …      CTA i takes items i, i + gridDim.x, …
//
// Where caches lie is in the kernel's arguments (4 KiB): pointers of each, strides of each kind of cache. Nothing has
// to be copied to the device before a launch, and a captured one stays valid as long as the caches do.
#include <algorithm>

#include "arch/fast_divide.h"
#include "arch/launch.cuh"
#include "elementwise/copy_blocks.h"

namespace fastattn {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kLoads = 4;
constexpr int kPieceUnits = kCopyThreads * kLoads;
constexpr int kMaxLayouts = 4;  // of a launch: keys and values have one, their scales another

struct BlockLayout {
  BlockStrides source, target;
  FastDivide units_per_token, units_per_row;
  int32_t unit_bytes = 0;

  bool operator==(const BlockLayout& other) const {
    return source == other.source && target == other.target && unit_bytes == other.unit_bytes &&
           units_per_token.divisor == other.units_per_token.divisor &&
           units_per_row.divisor == other.units_per_row.divisor;
  }
};

struct CopyBlocksArgs {
  BlockLayout layouts[kMaxLayouts];
  const char* sources[kMaxCachesPerLaunch];
  char* targets[kMaxCachesPerLaunch];
  uint8_t layout_of[kMaxCachesPerLaunch];
  const int32_t* block_mapping;
  const int32_t* num_tokens;
  int64_t mapping_stride, num_items;
  int32_t num_caches, pieces_per_block, num_source_blocks, num_target_blocks, block_size;
};
static_assert(sizeof(CopyBlocksArgs) <= 4096, "a launch takes longer with more");

// Units first … of the block, up to num_units: a piece of it.
template <typename Unit>
__device__ __forceinline__ void copy_piece(const char* source, char* target, const BlockLayout& layout, int32_t first,
                                           int32_t num_units) {
  const auto offset = [&](const BlockStrides& strides, int32_t unit) {
    const int32_t token = layout.units_per_token.divide(unit);
    const int32_t in_token = unit - token * layout.units_per_token.divisor;
    const int32_t row = layout.units_per_row.divide(in_token);
    const int32_t in_row = in_token - row * layout.units_per_row.divisor;
    return token * strides.token + row * strides.row + in_row * static_cast<int64_t>(sizeof(Unit));
  };
  Unit units[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int32_t unit = first + i * kCopyThreads + threadIdx.x;
    if (unit < num_units) units[i] = *reinterpret_cast<const Unit*>(source + offset(layout.source, unit));
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int32_t unit = first + i * kCopyThreads + threadIdx.x;
    if (unit < num_units) *reinterpret_cast<Unit*>(target + offset(layout.target, unit)) = units[i];
  }
}

__global__ void __launch_bounds__(kCopyThreads) copy_blocks_kernel(const __grid_constant__ CopyBlocksArgs a) {
  for (int64_t item = blockIdx.x; item < a.num_items; item += gridDim.x) {
    const int64_t block_item = item / a.pieces_per_block;  // pair, cache
    const int32_t piece = static_cast<int32_t>(item - block_item * a.pieces_per_block);
    const int64_t pair = block_item / a.num_caches;
    const int32_t cache = static_cast<int32_t>(block_item - pair * a.num_caches);

    const int32_t from = a.block_mapping[pair * a.mapping_stride];
    const int32_t to = a.block_mapping[pair * a.mapping_stride + 1];
    if (from < 0 || from >= a.num_source_blocks || to < 0 || to >= a.num_target_blocks) continue;
    const BlockLayout& layout = a.layouts[a.layout_of[cache]];
    const int32_t num_tokens = a.num_tokens == nullptr ? a.block_size : min(a.num_tokens[pair], a.block_size);
    const int32_t num_units = max(num_tokens, 0) * layout.units_per_token.divisor;
    const char* const source = a.sources[cache] + from * layout.source.block;
    char* const target = a.targets[cache] + to * layout.target.block;
    if (layout.unit_bytes == 16) {
      copy_piece<uint4>(source, target, layout, piece * kPieceUnits, num_units);
    } else if (layout.unit_bytes == 4) {
      copy_piece<uint32_t>(source, target, layout, piece * kPieceUnits, num_units);
    } else {
      copy_piece<uint8_t>(source, target, layout, piece * kPieceUnits, num_units);
    }
  }
}

BlockLayout layout_of(const BlockCopy& cache) {
  BlockLayout layout;
  layout.source = cache.source_strides;
  layout.target = cache.target_strides;
  const auto bits = [](const BlockStrides& s) { return s.block | s.token | s.row; };
  const int64_t all = bits(layout.source) | bits(layout.target) | cache.row_bytes |
                      static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.source)) |
                      static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.target));
  layout.unit_bytes = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
  const int32_t units_per_row = cache.row_bytes / layout.unit_bytes;
  layout.units_per_row = FastDivide(units_per_row);
  layout.units_per_token = FastDivide(units_per_row * cache.num_rows);
  return layout;
}

}  // namespace

cudaError_t copy_blocks(const CopyBlocksParams& p, cudaStream_t stream) {
  CopyBlocksArgs args = {};
  args.block_mapping = p.block_mapping;
  args.num_tokens = p.num_tokens;
  args.mapping_stride = p.mapping_stride;
  args.num_source_blocks = p.num_source_blocks;
  args.num_target_blocks = p.num_target_blocks;
  args.block_size = p.block_size;
  int num_layouts = 0;
  const auto launch = [&] {
    args.num_items = p.num_pairs * args.num_caches * args.pieces_per_block;
    const int64_t num_ctas = std::min<int64_t>(args.num_items, p.max_ctas);
    const cudaError_t error = launch_kernel(copy_blocks_kernel, num_ctas, kCopyThreads, 0, stream, args);
    num_layouts = args.num_caches = args.pieces_per_block = 0;
    return error;
  };
  for (const BlockCopy& cache : p.caches) {
    const BlockLayout layout = layout_of(cache);
    const auto known = [&] { return std::find(args.layouts, args.layouts + num_layouts, layout) - args.layouts; };
    if (args.num_caches == kMaxCachesPerLaunch || known() == kMaxLayouts) {
      if (const cudaError_t error = launch(); error != cudaSuccess) return error;
    }
    const int idx = static_cast<int>(known());
    if (idx == num_layouts) args.layouts[num_layouts++] = layout;
    args.layout_of[args.num_caches] = static_cast<uint8_t>(idx);
    args.sources[args.num_caches] = static_cast<const char*>(cache.source);
    args.targets[args.num_caches++] = static_cast<char*>(cache.target);
    const int32_t units_per_block = p.block_size * layout.units_per_token.divisor;
    args.pieces_per_block = std::max(args.pieces_per_block, (units_per_block + kPieceUnits - 1) / kPieceUnits);
  }
  return args.num_caches > 0 ? launch() : cudaSuccess;
}

}  // namespace fastattn
