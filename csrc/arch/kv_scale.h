// What the numbers of a K or V cache of 8 bits are multiplied by.
#pragma once

#include <cstdint>

namespace fastattn {

// Strides count elements; those of blocks and tokens are 0 where a KV head has one for all of them.
struct KvScale {
  float* data = nullptr;  // (Hk), or (num_blocks, block_size, Hk); nullptr: ones
  int64_t block_stride = 0, token_stride = 0, head_stride = 0;
};

}  // namespace fastattn
