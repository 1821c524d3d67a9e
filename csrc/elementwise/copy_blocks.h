// Copies of KV blocks: inside a paged cache, and between it and pinned host memory. The kernel is in copy_blocks.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace fastattn {

struct BlockStrides {
  int64_t block = 0, token = 0, row = 0;  // bytes

  bool operator==(const BlockStrides& other) const {
    return block == other.block && token == other.token && row == other.row;
  }
};

// One cache, (num_blocks, block_size, rows, row_bytes) on both sides: rows are the KV heads of keys and values.
struct BlockCopy {
  const void* source = nullptr;
  void* target = nullptr;
  BlockStrides source_strides, target_strides;
  int32_t num_rows = 1;  // of a token
  int32_t row_bytes = 0;
};

struct CopyBlocksParams {
  std::vector<BlockCopy> caches;
  const int32_t* block_mapping = nullptr;  // (num_pairs, 2): from, to
  const int32_t* num_tokens = nullptr;     // (num_pairs) of each block's beginning, or nullptr: all
  int64_t mapping_stride = 2;              // elements
  int64_t num_pairs = 0;
  int32_t num_source_blocks = 0, num_target_blocks = 0, block_size = 0;
  int32_t max_ctas = INT32_MAX;
};

// A pair with a block that is not there copies nothing; num_tokens is cut to 0 … block_size. One launch for every
// kMaxCachesPerLaunch caches. A block's bytes must be below 2^31.
cudaError_t copy_blocks(const CopyBlocksParams& params, cudaStream_t stream);

constexpr int kMaxCachesPerLaunch = 200;

}  // namespace fastattn
