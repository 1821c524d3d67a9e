// The XOR swizzle of shared-memory tiles that cp.async writes and ldmatrix reads.
//
// A tile is ROWS x COLS of 16-bit values; a chunk is 8 of them (16 bytes, one ldmatrix row). Stored
// plainly, the 8 rows of one ldmatrix tile would start in the same banks. XOR-ing the chunk index
// with the row spreads them over all 32:
//
//   COLS = 64 (a row is 128 bytes)      COLS = 32 (two rows are 128 bytes)
//   row 0:  c0 c1 c2 c3 c4 c5 c6 c7     rows 0, 1:  c0 c1 c2 c3 | c0 c1 c2 c3
//   row 1:  c1 c0 c3 c2 c5 c4 c7 c6     rows 2, 3:  c1 c0 c3 c2 | c1 c0 c3 c2
//   row 2:  c2 c3 c0 c1 c6 c7 c4 c5     rows 4, 5:  c2 c3 c0 c1 | c2 c3 c0 c1
//
// An odd number of halves of 128 bytes (COLS = 96) is as COLS = 32: rows begin in different halves in turn.
// Rows of one or two chunks (4-bit weights, which are not read by ldmatrix) lie as they are.
#pragma once

namespace fastattn {

// Which low bits of a chunk's index a tile with COLS columns swaps around.
template <int COLS>
inline constexpr int kSwizzleMask = COLS < 32         ? 0
                                    : COLS % 64 == 32 ? 3
                                                      : 7;

// Element offset of `chunk` of `row` in a swizzled tile with COLS columns.
template <int COLS>
__device__ __forceinline__ constexpr int swizzled(int row, int chunk) {
  static_assert(COLS == 8 || COLS == 16 || COLS % 32 == 0, "8, 16 or n * 32 columns");
  const int key = (COLS % 64 == 32 ? row >> 1 : row) & kSwizzleMask<COLS>;
  return row * COLS + (chunk ^ key) * 8;
}

}  // namespace fastattn
