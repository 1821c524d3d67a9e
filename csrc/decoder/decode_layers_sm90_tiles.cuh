// Products of the kernel for a decoder's layers (decode_layers_sm90.cuh) whose weights have 4 bits, in tiles. Included
// behind the kernel's struct.
//
// A tile is the left operand of mma.m16n8k16 as it lies, 16 rows of weight and four times 16 columns, and tokens are
// the columns of the right one. An item is a row of tiles, of gates and ups one of each, whose sums of a row then meet
// in one thread. A stage has 32 tiles, of 2,048 columns, or of both 1,024, and their scales: two or four copies, as
// they lie in memory. Weights cannot take a norm's along: what is multiplied is multiplied with it when it is received,
// and its squares are added up there.
//
// Making numbers of eight codes takes some 20 instructions, most of which wait for the one before: eight warps, two to
// a scheduler, took 1,900 cycles for a stage that comes in 1,000. So eight more help, which do nothing else: every
// sixteenth tile of columns is a warp's.
#pragma once

namespace fastattn {
namespace {

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::copy_tiles(int layer, int which, uint64_t policy) {
  const int row_tiles = which == kGateUp ? 2 : 1, most = kStageTiles / row_tiles;
  const int items = products[which].items, columns = products[which].columns / kTileColumns;
  const auto* const codes = reinterpret_cast<const unsigned char*>(weight_of(layer, which));
  const unsigned char* const scales = all.tiles[layer].scales[which];
  for (int item = first_item(products[which]); item < items; item += ctas) {
    const int64_t first = int64_t{lane * items + item} * columns;
    for (int column = 0; column < columns; column += most) {
      const int count = min(most, columns - column);
      empty(stage).wait(parity ^ 1);
      if (lane == 0) full(stage).arrive_expect_bytes(row_tiles * count * (kTileBytes + kTileScaleBytes));
      __syncwarp();
      if (lane < row_tiles) {
        unsigned char* const target = smem + layout.ring + stage * STAGE_BYTES;
        tma_load_bytes(target + lane * most * kTileBytes, codes + (first + column) * kTileBytes, full(stage),
                       count * kTileBytes, policy);
        tma_load_bytes(target + kStageTiles * kTileBytes + lane * most * kTileScaleBytes,
                       scales + (first + column) * kTileScaleBytes, full(stage), count * kTileScaleBytes, policy);
      }
      next_stage();
    }
  }
}

// As `receive`, but columns lie in their order, and with a norm they take its weight along.
template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
template <int BLOCKS, bool NORMED>
__device__ __forceinline__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::receive_columns(
    Seen<BLOCKS>& seen, const uint32_t* buffer, int columns, int column, uint32_t wanted, const T* norm,
    float (&squares_of_tokens)[MOST_TOKENS]) {
  uint2 of_norm[BLOCKS];
#pragma unroll
  for (int block = 0; NORMED && block < BLOCKS; ++block) {
    const int at = column + block * kStageColumns + 4 * thread;
    if (at < columns) of_norm[block] = __ldg(reinterpret_cast<const uint2*>(norm + at));
  }
  while (!has_seen<BLOCKS>(seen, columns, column, wanted)) look_at<BLOCKS>(seen, buffer, columns, column, &wanted);
  unsigned char* const target = smem + layout.x + 2 * column + 8 * thread;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block) {
    if (column + block * kStageColumns + 4 * thread >= columns) break;
#pragma unroll
    for (int token = 0; token < MOST_TOKENS; ++token) {
      if (token >= num_tokens) break;
      uint2 words = make_uint2(seen[block][token].x, seen[block][token].z);
      if constexpr (NORMED) {
        const float2 a = unpack_pair<T>(words.x), b = unpack_pair<T>(words.y);
        const float2 c = unpack_pair<T>(of_norm[block].x), d = unpack_pair<T>(of_norm[block].y);
        squares_of_tokens[token] += (a.x * a.x + a.y * a.y) + (b.x * b.x + b.y * b.y);
        words = make_uint2(pack_pair<T>(a.x * c.x, a.y * c.y), pack_pair<T>(b.x * d.x, b.y * d.y));
      }
      *reinterpret_cast<uint2*>(target + token * x_pitch(columns) + block * 2 * kStageColumns) = words;
    }
  }
  look_at<BLOCKS>(seen, buffer, columns, column + BLOCKS * kStageColumns);
  meet_helpers();
}

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
template <int WHICH, bool HELPS>
__device__ __forceinline__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::multiply_tiles(int layer) {
  constexpr bool NORMED = WHICH == kQkv || WHICH == kGateUp;
  constexpr int ROW_TILES = WHICH == kGateUp ? 2 : 1, MOST = kStageTiles / ROW_TILES, OF_WARP = MOST / kTileWarps;
  constexpr int ROWS = 2 * kTileRows;  // of sums, for each warp and token
  forget();
  const Product& product = products[WHICH];
  const int items = product.items, columns = product.columns;
  const uint32_t* const buffer = workspace() + product.buffer;
  const uint32_t wanted = WHICH == kQkv ? mark - 1 : mark;
  const T* const norm = static_cast<const T*>(WHICH == kQkv ? all.tiles[layer].input_norm : all.tiles[layer].mlp_norm);
  // What a thread hands over of each item: two rows of a token.
  const int row = lane % (kTileRows / 2) * 2, of_token = lane / (kTileRows / 2) % MOST_TOKENS;
  // Of what stands in a lane's column of the right operand: behind the last token that one, whose sums nobody reads.
  const int x_row = Weights::kFours ? g : lane % 8;
  const uint32_t x = shared_address(smem + layout.x) + min(x_row, num_tokens - 1) * x_pitch(columns) +
                     (Weights::kFours ? t * 8 : lane / 8 * 16);
  const auto sums_of_warp = [&](int of_warp, int token) {
    return reinterpret_cast<float*>(smem + layout.sums) +
           ((sums_turn * kTileWarps + of_warp) * num_tokens + token) * ROWS;
  };
  // What a warp multiplies of a stage, which is free as soon as it has that.
  struct Operands {
    uint4 codes[OF_WARP][ROW_TILES];
    Weights scales[OF_WARP][ROW_TILES];
  };
  const auto take_stage = [&](Operands& operands, int column) {
    const int count = (columns - column) / kTileColumns;
    const unsigned char* const source = smem + layout.ring + stage * STAGE_BYTES;
    full(stage).wait(parity);
#pragma unroll
    for (int i = 0; i < OF_WARP; ++i) {
      const int tile = min(warp + i * kTileWarps, count - 1);  // behind the last one that, times zero
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const int at = r * MOST + tile;
        operands.codes[i][r] = *reinterpret_cast<const uint4*>(source + at * kTileBytes + lane * 16);
        if (tile != warp + i * kTileWarps) operands.codes[i][r] = make_uint4(0, 0, 0, 0);
        operands.scales[i][r] = Weights(
            NoStepScales<1, 1>{}, source + kStageTiles * kTileBytes + at * kTileScaleBytes + g * 8, r, tile, lane);
      }
    }
    __syncwarp();
    if (lane == 0) empty(stage).arrive();
    next_stage();
  };
  const int first = first_item(product);
  int number = 0;
#pragma unroll 1
  for (int item = first; item < items; item += ctas, ++number) {
    const bool is_first = item == first;
    // Of each item another warp, so that none is behind the others.
    const bool hands_over =
        !HELPS && warp == number % kWarps && lane < kTileRows / 2 * MOST_TOKENS && of_token < num_tokens;
    float2 factors[ROW_TILES] = {};
    if (hands_over) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const float* const scales = all.tiles[layer].global_scales[WHICH] + (r * items + item) * kTileRows + row;
        const float2 two = __ldg(reinterpret_cast<const float2*>(scales));
        factors[r] = make_float2(Weights::kSumFactor / two.x, Weights::kSumFactor / two.y);
      }
    }
    float sums[ROW_TILES][2][4] = {}, squares_of_tokens[MOST_TOKENS] = {};
    Seen<kBlocks> seen;
    if (!HELPS && is_first) look_at<kBlocks>(seen, buffer, columns, 0);
#pragma unroll 1
    for (int column = 0; column < columns; column += MOST * kTileColumns) {
      const int count = (columns - column) / kTileColumns;
      Operands operands;
      take_stage(operands, column);
      if (is_first && column % (kBlocks * kStageColumns) == 0) {
        if constexpr (HELPS) {
          meet_helpers();
        } else {
          receive_columns<kBlocks, NORMED>(seen, buffer, columns, column, wanted, norm, squares_of_tokens);
        }
      }
#pragma unroll
      for (int i = 0; i < OF_WARP; ++i) {
        const int tile = min(warp + i * kTileWarps, count - 1);
        const uint32_t x_tile = x + (column + tile * kTileColumns) * 2;
        uint32_t b[8];
        if constexpr (Weights::kFours) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint2 four = load_shared_8_bytes(x_tile + j * 32);
            b[2 * j] = four.x, b[2 * j + 1] = four.y;
          }
        } else {
          uint32_t halves[2][4];
          ldmatrix_x4(halves[0], x_tile);
          ldmatrix_x4(halves[1], x_tile + 64);
#pragma unroll
          for (int j = 0; j < 8; ++j) b[j] = halves[j / 4][j % 4];
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          const uint4& codes = operands.codes[i][r];
          const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t a[4];
            operands.scales[i][r].make_fragment(a, words[j], j, lane);
            mma_m16n8k16<T>(sums[r][j % 2], a, b[2 * j], b[2 * j + 1]);
          }
        }
      }
    }
    // A lane has rows g and g + 8 of tokens 2t and 2t + 1.
#pragma unroll
    for (int of = 0; of < 2; ++of) {
      if (2 * t + of >= num_tokens) break;
      float* const target = sums_of_warp(warp, 2 * t + of);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        target[r * kTileRows + g] = sums[r][0][of] + sums[r][1][of];
        target[r * kTileRows + g + 8] = sums[r][0][of + 2] + sums[r][1][of + 2];
      }
    }
    if (!HELPS && NORMED && is_first) {
#pragma unroll
      for (int token = 0; token < MOST_TOKENS; ++token) {
        const float square = warp_reduce(squares_of_tokens[token], [](float a, float b) { return a + b; });
        if (lane == 0) squares()[warp * kDecodeMaxTokens + token] = square;
      }
    }
    meet_helpers();
    if (hands_over) {
      const auto of_rows = [&](int r) {
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < kTileWarps; ++w) {
          const auto part = *reinterpret_cast<const float2*>(sums_of_warp(w, of_token) + r * kTileRows + row);
          sum.x += part.x;
          sum.y += part.y;
        }
        return make_float2(sum.x * factors[r].x, sum.y * factors[r].y);
      };
      const float2 sum = of_rows(0);
      const float factor = NORMED ? norm_factor(of_token) : 1.0f;
      const int out_row = item * kTileRows + row;
      if constexpr (WHICH == kGateUp) {
        const float2 up = of_rows(1);
        const uint32_t words = pack_pair<T>(gated(sum.x * factor, up.x * factor), gated(sum.y * factor, up.y * factor));
        hand_over(workspace() + buffers.g + of_token * s.i + out_row, words, mark);
      } else if constexpr (WHICH == kQkv) {
        hand_over_qkv(layer, of_token, out_row, sum, factor);
      } else {
        add_to_residual(layer, WHICH, of_token, out_row, number, sum);
      }
    }
    sums_turn ^= 1;
  }
}

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::help() {
#pragma unroll 1
  for (int layer = 0; layer < p.num_layers; ++layer) {
    multiply_tiles<kQkv, true>(layer);
    multiply_tiles<kOut, true>(layer);
    multiply_tiles<kGateUp, true>(layer);
    multiply_tiles<kDown, true>(layer);
  }
}

}  // namespace
}  // namespace fastattn
