// The order in which attention kernels take their tiles: the CTAs of the persistent ones, or as CTAs (flash_sm80).
//
// A pair is a sequence and a head, and has a number of tiles, its levels. Tiles are numbered section by section: a
// section is a number of pairs that are worked on together, so few that they fit into the L2 cache; in it the first
// levels of all pairs come first, which with a causal mask have the most work.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arch/fast_divide.h"

namespace fastattn {

struct SectionOrder {
  int64_t pairs_per_section;  // in all sections but the last one
  int64_t num_sections;
  int64_t pairs_in_last;

  // With a causal mask tiles differ, and the work ends when the last one does: the last section has two tiles for each
  // SM, so that all that are left towards the end are small. There is at least one pair, and one level.
  static SectionOrder make(int64_t num_pairs, int64_t num_levels, int64_t pairs_per_section, bool causal,
                           int64_t num_sms) {
    SectionOrder order;
    order.pairs_per_section = std::min(num_pairs, pairs_per_section);
    const int64_t tail_tiles = causal ? 2 * num_sms : 0;
    const int64_t tail_pairs = std::min(num_pairs, (tail_tiles + num_levels - 1) / num_levels);
    const int64_t num_before =
        std::min(num_pairs - tail_pairs, num_pairs - 1) / order.pairs_per_section;  // whole sections before the last
    order.num_sections = num_before + 1;
    order.pairs_in_last = num_pairs - num_before * order.pairs_per_section;
    return order;
  }
};

// The same for a kernel, which gets a tile's number.
struct SectionLookup {
  FastDivide tiles;       // of a section but the last one
  FastDivide pairs;       // of it
  FastDivide last_pairs;  // and of the last one
  int32_t last_section = 0;

  SectionLookup() = default;
  SectionLookup(const SectionOrder& order, int64_t num_levels)
      : tiles(static_cast<int32_t>(order.pairs_per_section * num_levels)),
        pairs(static_cast<int32_t>(order.pairs_per_section)),
        last_pairs(static_cast<int32_t>(order.pairs_in_last)),
        last_section(static_cast<int32_t>(order.num_sections - 1)) {}

  struct Place {
    int32_t pair, level;
  };
  FASTATTN_HOST_DEVICE Place find(int32_t tile_idx) const {
    const int32_t of_all = tiles.divide(tile_idx);
    const int32_t section = of_all < last_section ? of_all : last_section;
    const int32_t in_section = tile_idx - section * tiles.divisor;
    const FastDivide& own_pairs = section == last_section ? last_pairs : pairs;
    const int32_t level = own_pairs.divide(in_section);
    return {section * pairs.divisor + in_section - level * own_pairs.divisor, level};
  }
};

}  // namespace fastattn
