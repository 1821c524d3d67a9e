// A decoder's layers for one to four tokens, one launch for all of them: what a step of one request is on Hopper.
//
//   h += out(attention(rope(qkv(norm(h)))))      h += down(act(gate(norm(h))) * up(norm(h)))      for each layer
//
// With a head h begins as rows of the embeddings, and logits = head(norm(h)) are made of what it ends as.
//
// One CTA an SM, all there at once (a cooperative launch). A warp brings the weights, eight warps do everything else:
//
//   copies     qkv ─ out ─ gate, up ─ down ─ qkv ─ out …    each CTA its rows, one stage after the other, never waiting
//               │                                           for anything but a free stage: weights hang on nothing
//   products   qkv ─→ attention ─→ merge ─→ out ─→ gate, up ─→ down ─→ qkv …
//                  Q            P        A     O           G       D       what all CTAs hand to each other
//
// While eight warps wait for the others' results, the ring of stages fills (up to 190 KiB, 5 us of the memory's rate),
// so that memory works on: its time and that of the hand-overs are beside each other, not one after the other.
//
// Hand-over. A result is a pair of 16-bit numbers and a mark, 8 bytes that are written and read at once; the mark is
// the layer's number, counted on from launch to launch. Readers ask for the data itself until it has its mark (the LL
// protocol of NCCL): one trip to the L2 cache after the write, where a barrier and a load behind it would be two. There
// is one buffer for each letter, and that is enough: who writes one again has read D of the layer before, whose writers
// had read G, which all CTAs write, and only when they are done with the rest. What a product multiplies it takes by
// 2,048 columns, while the first of its units is multiplied; weights are in registers before it is there. Whoever waits
// looks for all that is missing at a time, and for what comes next before it multiplies.
//
// Products. A unit is eight rows of weight, the columns of mma.m16n8k16; of gates and ups four each, whose results are
// multiplied. Of short rows three units are multiplied at a time. Tokens are rows of A. The eight warps have
// every eighth 32 columns of a stage, whose K order both operands permute alike: a lane's 16 bytes of weight are the B
// of two products, of a token those of one A, whose upper and lower eight rows are its two halves (words 0, 2, 1, 3).
// So the first product is right in the upper rows, the second in the lower ones. Sums of the warps meet in shared
// memory, in their order. A CTA has the same rows of out and down, and with them those of the residual stream. Weights
// of 4 bits have products of their own, and eight warps more (decode_layers_sm90_tiles.cuh).
//
// Attention. A CTA has one KV head of a token, and a part of its keys, so many as there are CTAs, but as many keys as
// its warps have in registers at a time at least. Scores and sums of values are by mma, with K and V as they come from
// memory. Who has all keys hands over what out multiplies; else a CTA for each head merges its parts, its warps each
// every eighth.
//
// Rounding is as in the kernels that do the same one by one: q, k and v, probabilities, the attention's output, the
// activations and the residual are rounded to T once each.
#pragma once

#include <cmath>
#include <cstddef>
#include <type_traits>

#include "arch/cache_policy.cuh"
#include "arch/exp2.cuh"
#include "arch/global_memory.cuh"
#include "arch/hand_over.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/reduce.cuh"
#include "arch/registers.cuh"
#include "arch/shared_memory.cuh"
#include "arch/tma.cuh"
#include "arch/vec.cuh"
#include "decoder/decode_layers_sm90.h"
#include "decoder/decode_layers_sm90_layout.h"
#include "gemm/gemm_sm90_w4_tiles_formats.cuh"

namespace fastattn {
namespace {

// What a layer's weights are: numbers of T, or a type of gemm_sm90_w4_tiles_formats.cuh, codes of 4 bits in tiles.
struct SixteenBits {};

// MOST_TOKENS: of a launch, 1 or kDecodeMaxTokens.
template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
struct Decode {
  static constexpr bool IN_TILES = !std::is_same_v<Weights, SixteenBits>;
  static constexpr int UNIT = IN_TILES ? kTileRows : kUnit;  // rows of an item of the layers
  static constexpr int STAGE_BYTES = IN_TILES ? kTiledStageBytes : kStageBytes;
  // That multiply the layers' weights, and after them a group of which one warp copies.
  static constexpr int WARPS = IN_TILES ? kTileWarps : kWarps, THREADS = 32 * WARPS + 128;
  using ArgsOf = std::conditional_t<IN_TILES, TiledArgs, Args>;

  const ArgsOf& all;
  const DecodeLayersParams& p;
  const Sizes& s;
  const Buffers& buffers;
  const Layout& layout;
  const Product* const products;
  const int num_tokens;
  unsigned char* const smem;
  const int cta, ctas;
  int thread, warp, lane, g, t;
  uint32_t mark = 0;  // of this layer

  __device__ Decode(const ArgsOf& args, unsigned char* memory)
      : all(args),
        p(args.p),
        s(args.sizes),
        buffers(args.buffers),
        layout(args.layout),
        products(args.products),
        num_tokens(MOST_TOKENS == 1 ? 1 : args.p.num_tokens),
        smem(memory),
        cta(blockIdx.x),
        ctas(gridDim.x),
        thread(threadIdx.x),
        warp(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  __device__ MBarrier& full(int stage) { return reinterpret_cast<MBarrier*>(smem + layout.barriers)[stage]; }
  __device__ MBarrier& empty(int stage) {
    return reinterpret_cast<MBarrier*>(smem + layout.barriers)[kMaxStages + stage];
  }
  // Made anew each time: what follows from them the compiler would otherwise keep in registers from layer to layer, and
  // spill.
  __device__ __forceinline__ void forget() {
    asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane), "+r"(g), "+r"(t));
  }
  __device__ __forceinline__ uint32_t* workspace() const { return opaque(p.workspace); }
  template <typename P>
  __device__ static __forceinline__ P* opaque(P* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
  }

  __device__ void sync() { named_barrier_sync(kComputeBarrier, kThreads); }

  __device__ int first_item(const Product& product) const {
    const int item = cta - product.first;
    return item < 0 ? item + ctas : item;
  }
  __device__ const T* weight_of(int layer, int which) const {
    if (which == kHead) return static_cast<const T*>(p.head);
    const DecodeLayer& l = p.layers[layer];
    return static_cast<const T*>(which == kQkv ? l.qkv : which == kOut ? l.out : which == kGateUp ? l.gate_up : l.down);
  }

  // ------------------------------------------------------------------------------------------ copies
  uint32_t stage = 0, parity = 0;
  __device__ void next_stage() {
    if (++stage == layout.stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // By a warp that computes, also for one that helps, which has nothing to do with a head.
  __device__ void release_stage() {
#pragma unroll
    for (int i = 0; i < WARPS / kWarps; ++i) empty(stage).arrive();
  }

  __device__ void copy_weights() {
    const uint64_t policy = evict_first_policy();
    for (int i = 0; i < 4 * p.num_layers; ++i) {
      if constexpr (IN_TILES) {
        copy_tiles(i / 4, i % 4, policy);
      } else {
        copy_product(i / 4, i % 4, policy);
      }
    }
    if (p.token_ids != nullptr) copy_product(0, kHead, policy);
  }
  // An item's row: of gates and ups, which lie in turns of eight, four gates and the four ups that belong to them.
  __device__ static int row_of_item(int which, int item, int row) {
    if (which != kGateUp) return item * kUnit + row;
    return item / 2 * 2 * kUnit + row / 4 * kUnit + item % 2 * 4 + row % 4;
  }
  __device__ void copy_product(int layer, int which, uint64_t policy) {
    const T* const weight = weight_of(layer, which);
    const int columns = products[which].columns;
    for (int item = first_item(products[which]); item < products[which].items; item += ctas) {
      const T* const row = weight + int64_t{row_of_item(which, item, lane)} * columns;
      for (int column = 0; column < columns; column += kStageColumns) {
        const int bytes = min(kStageColumns, columns - column) * 2;
        empty(stage).wait(parity ^ 1);
        if (lane == 0) full(stage).arrive_expect_bytes(kUnit * bytes);
        __syncwarp();
        if (lane < kUnit) {
          unsigned char* const target = smem + layout.ring + stage * STAGE_BYTES + lane * kStagePitch;
          tma_load_bytes(target, row + column, full(stage), bytes, policy);
        }
        next_stage();
      }
    }
  }

  // ------------------------------------------------------------------------------------------ products
  int sums_turn = 0;

  __device__ float* sums_of(int slot, int of_warp, int token) {
    return reinterpret_cast<float*>(smem + layout.sums) +
           (((sums_turn * kSlots + slot) * kWarps + of_warp) * num_tokens + token) * kUnit;
  }
  // Of two neighbouring rows, over the warps.
  __device__ float2 sum_of_warps(int slot, int of_token, int row) {
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(sums_of(slot, w, of_token) + row);
      sum.x += part.x;
      sum.y += part.y;
    }
    return sum;
  }
  __device__ float* squares() { return reinterpret_cast<float*>(smem + layout.squares); }
  // 1 / rms of a token's residual.
  __device__ float norm_factor(int of_token) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares()[w * kDecodeMaxTokens + of_token];
    return rsqrtf(sum * s.inverse_n + p.norm_eps);
  }

  // What a thread has seen of BLOCKS times kStageColumns columns that all CTAs make, of all tokens.
  template <int BLOCKS>
  using Seen = uint4[BLOCKS][MOST_TOKENS];
  template <int BLOCKS>
  __device__ __forceinline__ void look_at(Seen<BLOCKS>& seen, const uint32_t* buffer, int columns, int column,
                                          const uint32_t* wanted = nullptr) {
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const int at = column + block * kStageColumns + 4 * thread;
      if (at >= columns) break;
#pragma unroll
      for (int token = 0; token < MOST_TOKENS; ++token) {
        if (token >= num_tokens) break;
        uint4& v = seen[block][token];
        if (wanted == nullptr || v.y != *wanted || v.w != *wanted) v = look(buffer + token * columns + at);
      }
    }
  }
  template <int BLOCKS>
  __device__ __forceinline__ bool has_seen(const Seen<BLOCKS>& seen, int columns, int column, uint32_t wanted) {
    bool all = true;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      if (column + block * kStageColumns + 4 * thread >= columns) break;
#pragma unroll
      for (int token = 0; token < MOST_TOKENS; ++token) {
        if (token < num_tokens) all = all && seen[block][token].y == wanted && seen[block][token].w == wanted;
      }
    }
    return all;
  }
  // Columns from `column` on of what all CTAs made, to shared memory; `seen` by a first look, and then by that at the
  // columns behind them, which is under way while these are multiplied. All that is missing is looked for at a time.
  template <int BLOCKS>
  __device__ __forceinline__ void receive(Seen<BLOCKS>& seen, const uint32_t* buffer, int columns, int column,
                                          uint32_t wanted) {
    while (!has_seen<BLOCKS>(seen, columns, column, wanted)) look_at<BLOCKS>(seen, buffer, columns, column, &wanted);
    // Of eight columns words 0, 2, 1, 3.
    uint32_t* const target = reinterpret_cast<uint32_t*>(smem + layout.x + 2 * column) + thread / 2 * 4 + thread % 2;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      if (column + block * kStageColumns + 4 * thread >= columns) break;
#pragma unroll
      for (int token = 0; token < MOST_TOKENS; ++token) {
        if (token >= num_tokens) break;
        uint32_t* const words = target + token * (x_pitch(columns) / 4) + block * (kStageColumns / 2);
        words[0] = seen[block][token].x;
        words[2] = seen[block][token].z;
      }
    }
    look_at<BLOCKS>(seen, buffer, columns, column + BLOCKS * kStageColumns);
    sync();
  }

  // 32 columns of a unit, of all tokens. Rows 0 to 7 of the first sums and 8 to 15 of the second count.
  __device__ __forceinline__ void multiply_piece(float (&sums)[2][4], const uint4& x, const uint4& weight) {
    const uint32_t a[4] = {x.x, x.y, x.z, x.w};
    mma_m16n8k16<T>(sums[0], a, weight.x, weight.y);
    mma_m16n8k16<T>(sums[1], a, weight.z, weight.w);
  }
  // A lane has rows 2t, 2t + 1 of token g.
  __device__ __forceinline__ void keep_sums(int slot, const float (&sums)[2][4]) {
    if (g < num_tokens) {
      *reinterpret_cast<float2*>(sums_of(slot, warp, g) + 2 * t) =
          make_float2(sums[0][0] + sums[1][2], sums[0][1] + sums[1][3]);
    }
  }
  // Of tokens multiplied by tokens: token g's square is on the diagonal.
  __device__ __forceinline__ void keep_squares(const float (&sums)[2][4]) {
    if (g < num_tokens && t == g / 2) {
      squares()[warp * kDecodeMaxTokens + g] = g % 2 == 0 ? sums[0][0] + sums[1][2] : sums[0][1] + sums[1][3];
    }
  }

  // This warp's pieces of a stage, of `columns` columns.
  using Pieces = uint4[kPieces];
  __device__ __forceinline__ bool has_piece(int i, int columns) const { return (warp + i * kWarps) * 32 < columns; }
  __device__ __forceinline__ void load_weights(Pieces& w, int from, int columns) {
    const unsigned char* const row = smem + layout.ring + from * STAGE_BYTES + g * kStagePitch + 16 * t + 64 * warp;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (has_piece(i, columns)) w[i] = *reinterpret_cast<const uint4*>(row + i * kWarps * 64);
    }
  }
  // Of all tokens, from `column` of `pitch`'s columns on.
  __device__ __forceinline__ void load_x(Pieces& x, int column, int columns, int pitch) {
    const unsigned char* const row = smem + layout.x + g * pitch + 2 * column + 16 * t + 64 * warp;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      x[i] = make_uint4(0, 0, 0, 0);
      if (has_piece(i, columns) && g < num_tokens) x[i] = *reinterpret_cast<const uint4*>(row + i * kWarps * 64);
    }
  }
  __device__ __forceinline__ void multiply_square(float (&sums)[2][4], const uint4& x) {
    multiply_piece(sums, x, make_uint4(x.x, x.z, x.y, x.w));
  }

  // Items of a product with a single stage for each, up to kSlots at a time: what is multiplied is received while their
  // weights are in registers already, unless it is there.
  template <bool NORMED>
  __device__ __forceinline__ void multiply_short(const uint32_t* buffer, uint32_t wanted, int columns, int count,
                                                 bool is_first) {
    Seen<1> seen;
    if (is_first) look_at<1>(seen, buffer, columns, 0);
    Pieces w[kSlots], x;
    uint32_t from = stage, its_parity = parity;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i == count) break;
      full(from).wait(its_parity);
      load_weights(w[i], from, columns);
      if (++from == layout.stages) from = 0, its_parity ^= 1;
    }
    if (is_first) receive<1>(seen, buffer, columns, 0, wanted);
    load_x(x, 0, columns, x_pitch(columns));
    float sums[kSlots][2][4] = {}, square_sums[2][4] = {};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (!has_piece(piece, columns)) break;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        if (i < count) multiply_piece(sums[i], x[piece], w[i][piece]);
      }
      if (NORMED && is_first) multiply_square(square_sums, x[piece]);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (i < count) keep_sums(i, sums[i]);
    }
    if (NORMED && is_first) keep_squares(square_sums);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (lane == 0) release_stage();
      next_stage();
    }
  }

  // An item of several stages.
  template <bool NORMED>
  __device__ __forceinline__ void multiply_long(const uint32_t* buffer, uint32_t wanted, int columns, bool is_first) {
    float sums[2][4] = {}, square_sums[2][4] = {};
    Seen<kBlocks> seen;
    if (is_first) look_at<kBlocks>(seen, buffer, columns, 0);
#pragma unroll 1
    for (int column = 0; column < columns; column += kStageColumns) {
      Pieces w, x;
      full(stage).wait(parity);
      load_weights(w, stage, columns - column);
      if (is_first && column % (kBlocks * kStageColumns) == 0) {
        receive<kBlocks>(seen, buffer, columns, column, wanted);
      }
      load_x(x, column, columns - column, x_pitch(columns));
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (!has_piece(i, columns - column)) break;
        multiply_piece(sums, x[i], w[i]);
        if (NORMED && is_first) multiply_square(square_sums, x[i]);
      }
      __syncwarp();
      if (lane == 0) release_stage();
      next_stage();
    }
    keep_sums(0, sums);
    if (NORMED && is_first) keep_squares(square_sums);
  }

  // Items from `item` on, as many as meet at a time; their number.
  template <bool NORMED>
  __device__ __forceinline__ int multiply_items(const Product& product, int item, const uint32_t* buffer,
                                                uint32_t wanted, bool is_first) {
    if (product.columns > kStageColumns) {
      multiply_long<NORMED>(buffer, wanted, product.columns, is_first);
      return 1;
    }
    const int count = min(kSlots, (product.items - item + ctas - 1) / ctas);
    multiply_short<NORMED>(buffer, wanted, product.columns, count, is_first);
    return count;
  }

  // A product of the layer: what it multiplies from its buffer, what it makes handed over.
  template <int WHICH>
  __device__ __forceinline__ void multiply(int layer) {
    constexpr bool NORMED = WHICH == kQkv || WHICH == kGateUp;
    forget();
    const Product& product = products[WHICH];
    const int items = product.items;
    const uint32_t* const buffer = workspace() + product.buffer;
    const uint32_t wanted = WHICH == kQkv ? mark - 1 : mark;
    const int first = first_item(product);
    int number = 0;
#pragma unroll 1
    for (int item = first; item < items;) {
      const int count = multiply_items<NORMED>(product, item, buffer, wanted, item == first);
      sync();
      const int row = thread % 4 * 2, of_token = thread / 4 % MOST_TOKENS;
      const int index = thread / (4 * MOST_TOKENS);  // kThreads is enough for kSlots
      if (index < count && of_token < num_tokens) {
        const float2 sum = sum_of_warps(index, of_token, row);
        const float factor = NORMED ? norm_factor(of_token) : 1.0f;
        const int its_item = item + index * ctas, out_row = its_item * kUnit + row;
        if constexpr (WHICH == kGateUp) {
          if (row < 4) {
            const float2 up = sum_of_warps(index, of_token, row + 4);
            const uint32_t words =
                pack_pair<T>(gated(sum.x * factor, up.x * factor), gated(sum.y * factor, up.y * factor));
            hand_over(workspace() + buffers.g + of_token * s.i + its_item * (kUnit / 2) + row, words, mark);
          }
        } else if constexpr (WHICH == kQkv) {
          hand_over_qkv(layer, of_token, out_row, sum, factor);
        } else {
          add_to_residual(layer, WHICH, of_token, out_row, number + index, sum);
        }
      }
      sums_turn ^= 1;
      number += count;
      item += count * ctas;
    }
  }

  // Two neighbours of q, k or v, of a normalized token.
  __device__ __forceinline__ void hand_over_qkv(int layer, int of_token, int row, float2 sum, float factor) {
    // A layer's addresses are looked up only where they are needed: constant memory is slow the first time.
    float2 bias = make_float2(0.0f, 0.0f);
    if (s.has_bias) {
      bias = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.layers[layer].qkv_bias) + row));
    }
    const uint32_t words = pack_pair<T>(fmaf(sum.x, factor, bias.x), fmaf(sum.y, factor, bias.y));
    hand_over(workspace() + buffers.q + of_token * s.qkv_rows + row, words, mark);
  }

  __device__ float gated(float gate, float up) const {
    const float square = fminf(gate * gate, 0x1p60f);  // infinity times a factor of 0 would be NaN
    const float exponent = gate * fmaf(p.gate_cubic, square, p.gate_linear);
    return __fdividef(gate, 1.0f + exp2_approx(-exponent)) * up;
  }

  // Two neighbours of the residual stream that are this CTA's.
  __device__ uint32_t& own(int number, int token, int row) {
    return reinterpret_cast<uint32_t*>(smem +
                                       layout.own)[((number * kDecodeMaxTokens + token) * UNIT + row % UNIT) / 2];
  }
  __device__ uint32_t* residual_of(int token, int row) const {
    return reinterpret_cast<uint32_t*>(static_cast<T*>(p.residual) + token * s.n + row);
  }

  // The stream + what a product added up, rounded: a hand-over, and after the last layer the result.
  __device__ __forceinline__ void add_to_residual(int layer, int which, int of_token, int row, int number, float2 sum) {
    uint32_t& words = own(number, of_token, row);
    const float2 before = unpack_pair<T>(words);
    words = pack_pair<T>(before.x + sum.x, before.y + sum.y);
    const bool is_last = which == kDown && layer == p.num_layers - 1;
    if (!is_last || p.token_ids != nullptr) {
      hand_over(workspace() + (which == kOut ? buffers.o : buffers.d) + of_token * s.n + row, words, mark);
    }
    if (!is_last) return;
    *residual_of(of_token, row) = words;
    // All CTAs have read it: who is here has read G, which they all write.
    if (of_token == 0 && row == 0) p.workspace[0] = mark;
  }

  // A token's stream before the first layer: its row of the embeddings, null for an id that does not exist, whose row
  // is zeros; without a head that of `residual`.
  __device__ const T* begin_of(int token) const {
    if (p.token_ids == nullptr) return static_cast<const T*>(p.residual) + token * s.n;
    int64_t id = p.token_ids[token];
    if (id < 0 && id >= -p.num_drawn) id = p.drawn[-1 - id];
    return id >= 0 && id < p.vocab_size ? static_cast<const T*>(p.embedding) + id * s.n : nullptr;
  }

  // The stream as it is before the first layer, which is handed over like any other.
  __device__ void begin_residual(uint32_t before) {
    constexpr int PAIRS = UNIT / 2;  // threads for all units that a CTA may have
    const int row = thread % PAIRS * 2, token = thread / PAIRS % kDecodeMaxTokens;
    const int number = thread / (PAIRS * kDecodeMaxTokens), item = first_item(products[kOut]) + number * ctas;
    if (token < num_tokens && item < products[kOut].items) {
      const int at = item * UNIT + row;
      const T* const source = begin_of(token);
      own(number, token, row) = source != nullptr ? *reinterpret_cast<const uint32_t*>(source + at) : 0;
      hand_over(workspace() + buffers.d + token * s.n + at, own(number, token, row), before);
    }
  }

  // ------------------------------------------------------------------------------------------ attention

  // Which part of whose keys this CTA has, the same in all layers; nothing if begin is not below end. And which head of
  // whose results it merges: of so many parts, 0 for a row of padding, -1 if there is nothing to merge.
  struct Part {
    int token, kv_head, split, begin, end, length, slot, warp_keys;
    bool is_all;  // of the token's keys
    int merged_token, merged_head, merged_parts;
  };
  __device__ Part& part() { return *reinterpret_cast<Part*>(smem + layout.part); }

  static constexpr int MIN_KEYS = kWarps * kStepKeys * early_steps(HEAD_DIM);
  __device__ int splits_of(int keys) const { return max(1, min(s.splits, (keys + MIN_KEYS - 1) / MIN_KEYS)); }
  __device__ static int keys_of_split(int keys, int splits) { return ((keys + splits - 1) / splits + 7) / 8 * 8; }

  // By one thread.
  __device__ void find_part() {
    Part mine = {
        cta / s.splits / s.kv_heads, cta / s.splits % s.kv_heads, cta % s.splits, 0, 0, 0, -1, 0, false, 0, 0, -1};
    if (cta < num_tokens * s.heads) {
      mine.merged_token = cta / s.heads, mine.merged_head = cta % s.heads;
      const int keys = p.seqused_k[mine.merged_token], of_part = keys_of_split(keys, splits_of(keys));
      mine.merged_parts = keys > of_part ? (keys + of_part - 1) / of_part : keys > 0 ? -1 : 0;
    }
    if (mine.token < num_tokens) {
      mine.length = p.seqused_k[mine.token], mine.slot = p.slot_mapping[mine.token];
      const int keys = keys_of_split(mine.length, splits_of(mine.length));
      mine.begin = min(mine.length, mine.split * keys);
      mine.end = min(mine.length, mine.begin + keys);
      mine.warp_keys = keys_of_split(mine.end - mine.begin, kWarps);
      mine.is_all = keys >= mine.length;
    }
    part() = mine;
  }
  // What bring_head and attend look up, to shared memory.
  __device__ void keep_tables() {
    const Part mine = part();
    if (mine.begin >= mine.end) return;
    const int position = p.positions[mine.token];
    const bool exists = position >= 0 && position < p.max_position;
#pragma unroll 1
    for (int i = thread; i < HEAD_DIM; i += kThreads) {
      reinterpret_cast<float*>(smem + layout.angles)[i] = exists ? p.cos_sin[int64_t{position} * HEAD_DIM + i] : NAN;
    }
    bring_rows(mine, 0);
  }

  // Where keys of this warp are in the caches, in units of a page's row, kKnownKeys from the `first` of its own on.
  __device__ int* rows() { return reinterpret_cast<int*>(smem + layout.rows) + warp * kKnownKeys; }
  __device__ void bring_rows(const Part& of, int first) {
    const int begin = of.begin + warp * of.warp_keys, end = min(of.end, begin + of.warp_keys);
#pragma unroll 1
    for (int i = lane; i < kKnownKeys; i += 32) {
      const int key = begin + first + i;
      // The newest is not in the cache.
      rows()[i] = key < end && key != of.length - 1
                      ? p.block_table[of.token * p.block_table_stride + (key >> s.block_shift)] << s.block_shift |
                            (key & (p.block_size - 1))
                      : -1;
    }
  }

  // A head (from its first row of the QKV product) of the token to shared memory, normalized and rotated if it is one
  // of q or k. By one warp, whose first lanes have four dims of each half.
  __device__ void bring_head(int token, int row, bool rotated, const void* norm, T* target) {
    constexpr int HALF = HEAD_DIM / 2;
    const int at = 4 * lane;
    const bool has_dims = at < HALF;
    float values[2][4] = {};
    if (has_dims) {
      const uint32_t* source = workspace() + buffers.q + token * s.qkv_rows + row + at;
      const uint4 first[2] = {look(source), look(source + HALF)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 words = take(source + half * HALF, mark, first[half]);
        const float2 a = unpack_pair<T>(words.x), b = unpack_pair<T>(words.y);
        values[half][0] = a.x, values[half][1] = a.y, values[half][2] = b.x, values[half][3] = b.y;
      }
    }
    if (norm != nullptr) {
      float square_sum = 0.0f;
#pragma unroll
      for (const auto& half : values) {
#pragma unroll
        for (float value : half) square_sum += value * value;
      }
      square_sum = warp_reduce(square_sum, [](float a, float b) { return a + b; });
      const float factor = rsqrtf(square_sum / HEAD_DIM + p.qk_norm_eps);
      if (has_dims) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weight[4];
          load_vec<4>(static_cast<const T*>(norm) + half * HALF + at, weight);
#pragma unroll
          for (int i = 0; i < 4; ++i) values[half][i] = to_float(round_to<T>(values[half][i] * factor * weight[i]));
        }
      }
    }
    if (!has_dims) return;
    if (rotated) {
      const float* angles = reinterpret_cast<const float*>(smem + layout.angles) + at;
      float cos[4], sin[4];
      load_vec<4>(angles, cos);
      load_vec<4>(angles + HALF, sin);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = values[0][i], b = values[1][i];
        values[0][i] = a * cos[i] - b * sin[i];
        values[1][i] = b * cos[i] + a * sin[i];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) store_vec<4>(target + half * HALF + at, values[half]);
  }

  // A head's part: HEAD_DIM / 2 pairs of sums and their marks, then the largest score and the sum of probabilities.
  __device__ uint32_t* partial_of(int of_token, int head, int part) const {
    return workspace() + buffers.p + ((of_token * s.heads + head) * kMaxSplits + part) * ((HEAD_DIM / 2 + 1) * 4);
  }

  // ------------------------------------------------------------------------------------------ weights in tiles
  __device__ void copy_tiles(int layer, int which, uint64_t policy);
  template <int BLOCKS, bool NORMED>
  __device__ __forceinline__ void receive_columns(Seen<BLOCKS>& seen, const uint32_t* buffer, int columns, int column,
                                                  uint32_t wanted, const T* norm,
                                                  float (&squares_of_tokens)[MOST_TOKENS]);
  template <int WHICH, bool HELPS>
  __device__ __forceinline__ void multiply_tiles(int layer);
  __device__ void meet_helpers() { named_barrier_sync(kHelperBarrier, 32 * kTileWarps); }
  __device__ void help();

  // ------------------------------------------------------------------------------------------
  template <int WHICH>
  __device__ __forceinline__ void multiply_layers(int layer) {
    if constexpr (IN_TILES) {
      multiply_tiles<WHICH, false>(layer);
    } else {
      multiply<WHICH>(layer);
    }
  }
  __device__ void attend(int layer);
  __device__ void merge();
  __device__ void receive_normalized();
  __device__ void make_logits();
  __device__ void compute();
};

}  // namespace
}  // namespace fastattn

#include "decoder/decode_layers_sm90_attention.cuh"
#include "decoder/decode_layers_sm90_head.cuh"
#include "decoder/decode_layers_sm90_tiles.cuh"

namespace fastattn {
namespace {

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__device__ void Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::compute() {
  const uint32_t before = p.workspace[0] + 1;  // what is there at first has 0
  begin_residual(before);
  if (thread == 0) find_part();
  sync();
  keep_tables();
  sync();
#pragma unroll 1
  for (int layer = 0; layer < p.num_layers; ++layer) {
    mark = before + layer + 1;
    multiply_layers<kQkv>(layer);
    attend(layer);
    merge();
    multiply_layers<kOut>(layer);
    multiply_layers<kGateUp>(layer);
    multiply_layers<kDown>(layer);
  }
  if (p.token_ids != nullptr) make_logits();
}

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights>
__global__ void __launch_bounds__(Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::THREADS, 1)
    decode_layers_kernel(const __grid_constant__ typename Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::ArgsOf args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using DecodeOf = Decode<T, HEAD_DIM, MOST_TOKENS, Weights>;
  constexpr bool IN_TILES = DecodeOf::IN_TILES;
  DecodeOf decode(args, &shared_storage_of_128<unsigned char>());
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < decode.layout.stages; ++i) {
      decode.full(i).init(1);
      decode.empty(i).init(DecodeOf::WARPS);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (decode.warp >= DecodeOf::WARPS) {
    give_registers<IN_TILES ? kTiledCopyRegisters : kCopyRegisters>();
    if (decode.warp == DecodeOf::WARPS) decode.copy_weights();
  } else if (decode.warp >= kWarps) {
    if constexpr (IN_TILES) {
      give_registers<kHelperRegisters>();
      decode.help();
    }
  } else {
    take_registers<IN_TILES ? kTiledComputeRegisters : kComputeRegisters>();
    decode.compute();
  }
#endif
}

template <typename T, int HEAD_DIM, int MOST_TOKENS, typename Weights = SixteenBits>
cudaError_t launch(const DecodeLayersParams& p, cudaStream_t stream) {
  const int num_ctas = decode_num_ctas(p);
  const typename Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::ArgsOf args(p, num_ctas);
  if (args.layout.stages < kSlots || args.buffers.end > p.workspace_words) return cudaErrorInvalidValue;
  constexpr int THREADS = Decode<T, HEAD_DIM, MOST_TOKENS, Weights>::THREADS;
  return launch_together(decode_layers_kernel<T, HEAD_DIM, MOST_TOKENS, Weights>, num_ctas, THREADS, args.layout.end,
                         stream, args);
}

}  // namespace
}  // namespace fastattn
