// Weights of 4 bits in tiles, as Hopper's kernels take them, for drawn calls: fastattn/reference/w4_tiles.py says how
// they lie.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

inline float e2m1_value(int code) {
  constexpr float kValues[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  return (code & 8 ? -1.0f : 1.0f) * kValues[code & 7];
}

inline uint32_t rotated(uint32_t word, int left) { return word << left | word >> (32 - left); }

// Of codes in the order of a fragment's registers, columns 2 t and 2 t + 1 of row g, of row g + 8, then 8 further on.
inline uint32_t fp4_word(const int (&codes)[8]) {
  uint32_t pairs[4];
  for (int i = 0; i < 4; ++i) {
    const auto number = [&](int code) { return static_cast<uint32_t>((code & 8) << 12 | (code & 7) << 6); };
    pairs[i] = number(codes[2 * i]) | number(codes[2 * i + 1]) << 16;
  }
  const auto [a, b, c, d] = pairs;
  uint32_t word = a | rotated(b, 20);
  word |= (d ^ rotated(word, 8)) >> 2 & 0x20202020u;
  word |= (c ^ word << 2) >> 6 & 0x02060206u;
  word |= rotated(d ^ word << 2, 24) & 0x00010001u;
  word |= (c ^ word << 6) >> 2 & 0x00100010u;
  return word | (rotated(d ^ word << 2, 24) & 0x40004000u);
}

inline uint32_t int4_word(const int (&codes)[8]) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(codes[i]) << (i / 2 * 4 + i % 2 * 16);
  return word;
}

// Of four columns of row g, and of row g + 8.
inline uint32_t fp8_word(const int (&codes)[8]) {
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) {
    word |= static_cast<uint32_t>(codes[i] & 7) << 4 * i;
    word |= static_cast<uint32_t>(codes[i] >> 3) << (i % 4 * 8 + (i < 4 ? 7 : 3));
  }
  return word;
}

// code(n, k) is a code.
template <typename Code>
std::vector<uint32_t> tiles_of(int64_t n, int64_t k, int order, uint32_t (*word_of)(const int (&)[8]), Code code) {
  std::vector<uint32_t> words(n * k / 8);
  for (int64_t idx = 0; idx < n * k / 8; ++idx) {
    const int64_t word = idx % 4, lane = idx / 4 % 32, tile = idx / 128 % (k / 64), row_tile = idx / 128 / (k / 64);
    int codes[8];
    for (int i = 0; i < 8; ++i) {
      const int64_t lower = order == 16 ? i / 2 % 2 : i / 4;
      const int64_t column = order == 16 ? lane % 4 * 2 + i % 2 + i / 4 * 8 : lane % 4 * 4 + i % 4;
      codes[i] = code(row_tile * 16 + lane / 4 + lower * 8, tile * 64 + word * 16 + column);
    }
    words[idx] = word_of(codes);
  }
  return words;
}

// scale(n, g) is a scale of one of a tile's `groups`.
template <typename Scale>
std::vector<uint8_t> scale_tiles_of(int64_t n, int64_t k, int64_t groups, Scale scale) {
  std::vector<uint8_t> bytes(n * k / 64 * groups);
  for (int64_t idx = 0; idx < static_cast<int64_t>(bytes.size()); ++idx) {
    const int64_t group = idx % groups, lower = idx / groups % 2, g = idx / groups / 2 % 8;
    const int64_t tile = idx / groups / 16 % (k / 64), row_tile = idx / groups / 16 / (k / 64);
    bytes[idx] = scale(row_tile * 16 + g + lower * 8, tile * groups + group);
  }
  return bytes;
}

}  // namespace emulator
