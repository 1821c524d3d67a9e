// Draws calls of the block copies and holds every byte that they leave against copies in a loop.
#include "elementwise/copy_blocks.h"

#include "drawn_call.h"

namespace {

using namespace emulator;
using fastattn::BlockCopy;
using fastattn::BlockStrides;
using fastattn::CopyBlocksParams;

// The caches of one side, in memory that is full of noise: gaps, and what no pair names, must stay as they are.
struct Side {
  std::vector<std::vector<uint8_t>> memory;
  int num_blocks;
};

struct Kind {
  int num_rows, row_bytes;
  BlockStrides source, target;
};

BlockStrides draw_strides(int block_size, const Kind& kind, int unit) {
  BlockStrides strides;
  const bool rows_first = one_in(3);  // as in (Hk, block_size, D)
  int64_t inner = kind.row_bytes + unit * pick({0, 0, 1});
  int64_t& first = rows_first ? strides.token : strides.row;
  int64_t& second = rows_first ? strides.row : strides.token;
  first = inner;
  second = (rows_first ? block_size : kind.num_rows) * inner + unit * pick({0, 0, 3});
  strides.block = (rows_first ? kind.num_rows : block_size) * second + unit * pick({0, 0, 5});
  return strides;
}

void run_call() {
  CopyBlocksParams p;
  p.block_size = pick({1, 3, 8, 16, 64});
  const bool inside = one_in(2);
  const int num_pairs = pick({0, 1, 2, 5});
  const int num_caches = pick({1, 4, 7, 2 * fastattn::kMaxCachesPerLaunch + 3});
  std::vector<Kind> kinds(num_caches > 10 ? 2 : between(1, 6));
  for (Kind& kind : kinds) {
    const int unit = pick({1, 4, 16, 16});
    kind.num_rows = num_caches > 10 ? 1 : pick({1, 2, 3, 8});
    kind.row_bytes = unit * (num_caches > 10 ? 1 : pick({1, 3, 16}));
    kind.source = draw_strides(p.block_size, kind, unit);
    kind.target = inside ? kind.source : draw_strides(p.block_size, kind, unit);
  }
  Side source{{}, 2 * num_pairs + 1}, target{{}, inside ? 2 * num_pairs + 1 : num_pairs + 2};
  for (int cache = 0; cache < num_caches; ++cache) {
    const Kind& kind = kinds[cache % kinds.size()];
    const auto draw = [&](Side& side, const BlockStrides& strides) {
      side.memory.emplace_back(side.num_blocks * strides.block);
      for (uint8_t& byte : side.memory.back()) byte = static_cast<uint8_t>(draws());
    };
    draw(source, kind.source);
    if (!inside) draw(target, kind.target);
  }
  Side& written = inside ? source : target;
  Side expected = written;
  const Side before = source;
  for (int cache = 0; cache < num_caches; ++cache) {
    const Kind& kind = kinds[cache % kinds.size()];
    p.caches.push_back({source.memory[cache].data(), written.memory[cache].data(), kind.source, kind.target,
                        kind.num_rows, kind.row_bytes});
  }
  std::vector<int32_t> mapping, num_tokens;
  p.mapping_stride = pick({2, 3});
  for (int pair = 0; pair < num_pairs; ++pair) {
    const int from = pick({between(0, num_pairs), between(0, num_pairs), -1, source.num_blocks});
    const int to = pick({inside ? num_pairs + 1 + pair : pair, -1, written.num_blocks, 1 << 30});
    mapping.insert(mapping.end(), {from, inside || to >= 0 ? to : -1});
    mapping.resize((pair + 1) * p.mapping_stride, 0);
    num_tokens.push_back(pick({p.block_size, 0, between(0, p.block_size), -1, p.block_size + 7}));
  }
  p.block_mapping = mapping.data();
  p.num_tokens = one_in(2) ? num_tokens.data() : nullptr;
  p.num_pairs = num_pairs;
  p.num_source_blocks = source.num_blocks;
  p.num_target_blocks = written.num_blocks;
  p.max_ctas = pick({1, 3, INT32_MAX});
  current_call += ": " + std::to_string(num_caches) + " caches of " + std::to_string(kinds.size()) + " kinds, " +
                  std::to_string(num_pairs) + " pairs, blocks of " + std::to_string(p.block_size) + " tokens of " +
                  std::to_string(kinds[0].num_rows) + " x " + std::to_string(kinds[0].row_bytes) + " bytes, at most " +
                  std::to_string(p.max_ctas) + " CTAs";
  for (int cache = 0; cache < num_caches; ++cache) {
    const Kind& kind = kinds[cache % kinds.size()];
    for (int pair = 0; pair < num_pairs; ++pair) {
      const int from = mapping[pair * p.mapping_stride], to = mapping[pair * p.mapping_stride + 1];
      if (from < 0 || from >= source.num_blocks || to < 0 || to >= written.num_blocks) continue;
      const int count = p.num_tokens == nullptr ? p.block_size : std::clamp(num_tokens[pair], 0, p.block_size);
      for (int token = 0; token < count; ++token) {
        for (int row = 0; row < kind.num_rows; ++row) {
          const auto at = [&](const BlockStrides& s, int block) {
            return block * s.block + token * s.token + row * s.row;
          };
          std::memcpy(&expected.memory[cache][at(kind.target, to)], &before.memory[cache][at(kind.source, from)],
                      kind.row_bytes);
        }
      }
    }
  }

  if (num_pairs > 0 && copy_blocks(p, nullptr) != cudaSuccess) fail("the call is refused");
  for (int cache = 0; cache < num_caches; ++cache) {
    if (written.memory[cache] != expected.memory[cache]) fail("cache " + std::to_string(cache) + " is wrong");
  }
  if (!inside && source.memory != before.memory) fail("what is copied from was changed");
}

}  // namespace

int main(int argc, char** argv) {
  return run_calls(argc, argv, [](int, int) { run_call(); });
}
