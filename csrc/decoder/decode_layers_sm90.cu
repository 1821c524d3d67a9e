// A decoder's layers for one to four tokens, one launch for all of them: what a step of one request is on Hopper.
//
//   h += out(attention(rope(qkv(norm(h)))))      h += down(act(gate(norm(h))) * up(norm(h)))      for each layer
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
// 1,024 columns, while the first of its units is multiplied.
//
// Products. A unit is eight rows of weight, the columns of mma.m16n8k16; tokens are rows of its A. The eight warps have
// every eighth 32 columns of a stage, whose K order both operands permute alike: a lane's 16 bytes of weight are the B
// of two products, of a token those of one A, whose upper and lower eight rows are its two halves (words 0, 2, 1, 3).
// So the first product is right in the upper rows, the second in the lower ones. Sums of the warps meet in shared
// memory, in their order. A CTA has the same rows of out and down, and with them those of the residual stream.
//
// Attention. A CTA has one KV head of a token, and a part of its keys, so many as there are CTAs, 128 keys at least: 16
// for each warp at a time. Scores and sums of values are by mma, with K and V as they come from memory. A CTA for each
// head merges its parts, its warps each every eighth.
//
// Rounding is as in the kernels that do the same one by one: q, k and v, probabilities, the attention's output, the
// activations and the residual are rounded to T once each.
#include <cmath>
#include <cstddef>

#include "arch/cache_policy.cuh"
#include "arch/dispatch.h"
#include "arch/exp2.cuh"
#include "arch/global_memory.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/reduce.cuh"
#include "arch/vec.cuh"
#include "decoder/decode_layers_sm90.h"

namespace fastattn {
namespace {

constexpr int kWarps = 8;  // that compute
constexpr int kThreads = 32 * kWarps;
constexpr int kUnit = 8;  // rows of weight
constexpr int kStageColumns = 1024;
constexpr int kPieces = kStageColumns / 32 / kWarps;  // of 32 columns, of a warp
constexpr int kStagePitch = 2 * kStageColumns + 64;   // bytes; an odd multiple of 64 keeps rows apart in the banks
constexpr int kStageBytes = kUnit * kStagePitch;
constexpr int kMaxStages = 12;
constexpr int kSlots = 4;       // units whose sums meet at a time
constexpr int kOwnUnits = 16;   // of the residual stream, of a CTA
constexpr int kMaxSplits = 32;  // of a token's keys
constexpr int kStepKeys = 16;   // of a warp at a time
constexpr int kMinSplitKeys = kStepKeys * kWarps;
constexpr int kMaxBlocks = 512;  // of a CTA's keys that it knows by heart
constexpr int kSmemBytes = 227 * 1024;
constexpr int kComputeBarrier = 1;

enum { kQkv, kOut, kGateUp, kDown };  // products of a layer, in their order

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

// A product of each layer: what it multiplies, (tokens, columns) from `buffer` on; how many items, of so many units
// whose sums must be in one CTA; how many items meet at a time: long ones are handed over one by one, so that what
// comes next can begin. The first item is the CTA `first`'s, the next that of the next: those with one more are others
// each time.
struct Product {
  int columns, items, units, together, buffer, first;
  void set(int its_columns, int its_items, int its_units, int its_buffer, int its_first) {
    columns = its_columns, items = its_items, units = its_units, buffer = its_buffer, first = its_first;
    together = columns > kStageColumns ? 1 : kSlots / units;
  }
};

// Shared memory, bytes from its beginning.
struct Layout {
  int stages, x, sums, squares, own, heads, angles, blocks, part, partial, merged, barriers, ring, end;
  Layout(const Sizes& s, int tokens) {
    int widest = s.i > s.out_columns ? s.i : s.out_columns;
    if (s.n > widest) widest = s.n;
    x = 0;
    sums = x + tokens * x_pitch(widest);
    squares = sums + 2 * kSlots * kWarps * tokens * kUnit * 4;
    own = squares + kWarps * kDecodeMaxTokens * 4;
    heads = own + kOwnUnits * kDecodeMaxTokens * kUnit * 2;   // of q, then the token's key and value
    angles = heads + (kDecodeMaxGroup + 2) * s.head_dim * 2;  // cosines and sines of the token's position
    blocks = angles + s.head_dim * 4;
    part = blocks + kMaxBlocks * 4;
    partial = part + 64;
    merged = partial + kWarps * kDecodeMaxGroup * (s.head_dim + 4) * 4;
    barriers = merged + kWarps * s.head_dim * 4;
    ring = (barriers + 2 * kMaxStages * 8 + 127) / 128 * 128;
    stages = (kSmemBytes - ring) / kStageBytes;
    if (stages > kMaxStages) stages = kMaxStages;
    end = ring + stages * kStageBytes;
  }
};

// What does not change in a launch, made on the host: read from constant memory it takes no registers.
struct Args {
  DecodeLayersParams p;
  Sizes sizes;
  Buffers buffers;
  Layout layout;
  Product products[4];
  Args(const DecodeLayersParams& params, int ctas)
      : p(params), sizes(params, ctas), buffers(sizes), layout(sizes, params.num_tokens) {
    const int n = sizes.n / kUnit, i = sizes.i / kUnit;
    products[kQkv].set(sizes.n, sizes.qkv_rows / kUnit, 1, buffers.d, (n + i) % ctas);
    products[kOut].set(sizes.out_columns, n, 1, buffers.a, 0);  // as of down: the same rows of the residual stream
    products[kGateUp].set(sizes.n, i, 2, buffers.o, n % ctas);
    products[kDown].set(sizes.i, n, 1, buffers.g, 0);
  }
};

// -------------------------------------------------------------------------------------------- hand-over

__device__ __forceinline__ void hand_over(uint32_t* target, uint32_t value, uint32_t mark) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};\n" ::"l"(target), "r"(value), "r"(mark) : "memory");
}

__device__ __forceinline__ void hand_over(uint32_t* target, float first, float second, uint32_t mark) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %2};\n" ::"l"(target), "r"(__float_as_uint(first)),
               "r"(mark), "r"(__float_as_uint(second))
               : "memory");
}

__device__ __forceinline__ uint4 look(const uint32_t* source) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
}

// Two words with their marks, as soon as they are there; v is what the first look saw.
__device__ __forceinline__ uint2 take(const uint32_t* source, uint32_t mark, uint4 v) {
  while (v.y != mark || v.w != mark) v = look(source);
  return make_uint2(v.x, v.z);
}

// -------------------------------------------------------------------------------------------- the kernel

template <typename T, int HEAD_DIM>
struct Decode {
  const DecodeLayersParams& p;
  const Sizes& s;
  const Buffers& buffers;
  const Layout& layout;
  const Product* const products;
  unsigned char* const smem;
  const int cta, ctas, warp, lane, g, t;
  uint32_t mark = 0;  // of this layer

  __device__ Decode(const Args& args, unsigned char* memory)
      : p(args.p),
        s(args.sizes),
        buffers(args.buffers),
        layout(args.layout),
        products(args.products),
        smem(memory),
        cta(blockIdx.x),
        ctas(gridDim.x),
        warp(__shfl_sync(0xffffffffu, threadIdx.x / 32, 0)),
        lane(threadIdx.x % 32),
        g(threadIdx.x % 32 / 4),
        t(threadIdx.x % 4) {}

  __device__ MBarrier& full(int stage) { return reinterpret_cast<MBarrier*>(smem + layout.barriers)[stage]; }
  __device__ MBarrier& empty(int stage) {
    return reinterpret_cast<MBarrier*>(smem + layout.barriers)[kMaxStages + stage];
  }
  // Made anew each time: what is added to them the compiler would otherwise keep in registers from layer to layer, and
  // spill.
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

  __device__ void copy_weights() {
    const uint64_t policy = evict_first_policy();
    for (int i = 0; i < 4 * p.num_layers; ++i) copy_product(i / 4, i % 4, policy);
  }
  // Of an item the units' stages take turns: they are multiplied by the same columns.
  __device__ void copy_product(int layer, int which, uint64_t policy) {
    const T* const weight = weight_of(layer, which);
    const int columns = products[which].columns, units = products[which].units;
    for (int item = first_item(products[which]); item < products[which].items; item += ctas) {
      for (int column = 0; column < columns; column += kStageColumns) {
        const int bytes = min(kStageColumns, columns - column) * 2;
        for (int unit = 0; unit < units; ++unit) {
          const int row = (item * units + unit) * kUnit + lane;
          empty(stage).wait(parity ^ 1);
          if (lane == 0) full(stage).arrive_expect_bytes(kUnit * bytes);
          __syncwarp();
          if (lane < kUnit) {
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                "[%0], [%1], %2, [%3], %4;\n" ::"r"(
                    shared_address(smem + layout.ring + stage * kStageBytes + lane * kStagePitch)),
                "l"(weight + int64_t{row} * columns + column), "r"(bytes), "r"(shared_address(&full(stage).state)),
                "l"(policy)
                : "memory");
          }
          next_stage();
        }
      }
    }
  }

  // ------------------------------------------------------------------------------------------ products
  int sums_turn = 0;

  __device__ float* sums_of(int slot, int of_warp, int token) {
    return reinterpret_cast<float*>(smem + layout.sums) +
           (((sums_turn * kSlots + slot) * kWarps + of_warp) * p.num_tokens + token) * kUnit;
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

  // Columns from `column` on of what all CTAs made, to shared memory.
  __device__ void receive(const uint32_t* buffer, int columns, int column, uint32_t wanted) {
    const int at = column + 4 * threadIdx.x;
    if (at < columns) {
      uint4 first[kDecodeMaxTokens];
#pragma unroll
      for (int token = 0; token < kDecodeMaxTokens; ++token) {
        if (token < p.num_tokens) first[token] = look(buffer + token * columns + at);
      }
#pragma unroll
      for (int token = 0; token < kDecodeMaxTokens; ++token) {
        if (token >= p.num_tokens) break;
        // Of eight columns words 0, 2, 1, 3.
        uint32_t* target =
            reinterpret_cast<uint32_t*>(smem + layout.x + token * x_pitch(columns)) + at / 8 * 4 + at / 4 % 2;
        const uint2 words = take(buffer + token * columns + at, wanted, first[token]);
        target[0] = words.x;
        target[2] = words.y;
      }
    }
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
    if (g < p.num_tokens) {
      *reinterpret_cast<float2*>(sums_of(slot, warp, g) + 2 * t) =
          make_float2(sums[0][0] + sums[1][2], sums[0][1] + sums[1][3]);
    }
  }
  // Of tokens multiplied by tokens: token g's square is on the diagonal.
  __device__ __forceinline__ void keep_squares(const float (&sums)[2][4]) {
    if (g < p.num_tokens && t == g / 2) {
      squares()[warp * kDecodeMaxTokens + g] = g % 2 == 0 ? sums[0][0] + sums[1][2] : sums[0][1] + sums[1][3];
    }
  }

  // An item, whose units' stages take turns; the product's first one receives what it multiplies on the way.
  __device__ __forceinline__ void multiply_item(const uint32_t* buffer, uint32_t wanted, int columns, int units,
                                                int slot, bool is_first, bool with_squares) {
    float sums[2][2][4] = {}, square_sums[2][4] = {};
#pragma unroll 1
    for (int column = 0; column < columns; column += kStageColumns) {
      if (is_first) receive(buffer, columns, column, wanted);
      const unsigned char* const row = smem + layout.x + g * x_pitch(columns) + 16 * t + 2 * column;
      uint4 x[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int at = (warp + i * kWarps) * 32;
        x[i] = make_uint4(0, 0, 0, 0);
        if (column + at < columns && g < p.num_tokens) x[i] = *reinterpret_cast<const uint4*>(row + 2 * at);
      }
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        if (unit == units) break;
        const unsigned char* weight = smem + layout.ring + stage * kStageBytes + g * kStagePitch + 16 * t;
        full(stage).wait(parity);
        uint4 w[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int at = (warp + i * kWarps) * 32;
          if (column + at < columns) w[i] = *reinterpret_cast<const uint4*>(weight + 2 * at);
        }
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          if (column + (warp + i * kWarps) * 32 >= columns) break;
          multiply_piece(sums[unit], x[i], w[i]);
          if (with_squares && unit == 0) multiply_piece(square_sums, x[i], make_uint4(x[i].x, x[i].z, x[i].y, x[i].w));
        }
        __syncwarp();
        if (lane == 0) empty(stage).arrive();
        next_stage();
      }
    }
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      if (unit < units) keep_sums(slot + unit, sums[unit]);
    }
    if (with_squares) keep_squares(square_sums);
  }

  // A product of the layer: what it multiplies from `buffer`, what it makes handed over.
  __device__ __forceinline__ void multiply(int layer, int which) {
    const bool is_normed = which == kQkv || which == kGateUp;
    const Product& product = products[which];
    const int columns = product.columns, items = product.items, units = product.units;
    const uint32_t* const buffer = workspace() + product.buffer;
    const uint32_t wanted = which == kQkv ? mark - 1 : mark;
    const int first = first_item(product);
    int number = 0;
#pragma unroll 1
    for (int item = first; item < items;) {
      int count = 0;
#pragma unroll 1
      for (; count < product.together && item + count * ctas < items; ++count) {
        const bool is_first = item == first && count == 0;
        multiply_item(buffer, wanted, columns, units, count * units, is_first, is_normed && is_first);
      }
      sync();
      const int row = threadIdx.x % 4 * 2, of_token = threadIdx.x / 4 % kDecodeMaxTokens;
      const int index = threadIdx.x / (4 * kDecodeMaxTokens);  // kThreads is enough for kSlots
      if (index < count && of_token < p.num_tokens) {
        const float2 sum = sum_of_warps(units * index, of_token, row);
        const float factor = is_normed ? norm_factor(of_token) : 1.0f;
        const int out_row = (item + index * ctas) * kUnit + row;
        if (which == kGateUp) {
          const float2 up = sum_of_warps(2 * index + 1, of_token, row);
          const uint32_t words =
              pack_pair<T>(gated(sum.x * factor, up.x * factor), gated(sum.y * factor, up.y * factor));
          hand_over(workspace() + buffers.g + of_token * s.i + out_row, words, mark);
        } else if (which == kQkv) {
          // A layer's addresses are looked up only where they are needed: constant memory is slow the first time.
          float2 bias = make_float2(0.0f, 0.0f);
          if (s.has_bias) {
            bias = unpack_pair<T>(
                *reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.layers[layer].qkv_bias) + out_row));
          }
          const uint32_t words = pack_pair<T>(fmaf(sum.x, factor, bias.x), fmaf(sum.y, factor, bias.y));
          hand_over(workspace() + buffers.q + of_token * s.qkv_rows + out_row, words, mark);
        } else {
          add_to_residual(layer, which, of_token, out_row, number + index, sum);
        }
      }
      sums_turn ^= 1;
      number += count;
      item += count * ctas;
    }
  }

  __device__ float gated(float gate, float up) const {
    const float square = fminf(gate * gate, 0x1p60f);  // infinity times a factor of 0 would be NaN
    const float exponent = gate * fmaf(p.gate_cubic, square, p.gate_linear);
    return __fdividef(gate, 1.0f + exp2_approx(-exponent)) * up;
  }

  // Two neighbours of the residual stream that are this CTA's.
  __device__ uint32_t& own(int number, int token, int row) {
    return reinterpret_cast<uint32_t*>(smem +
                                       layout.own)[((number * kDecodeMaxTokens + token) * kUnit + row % kUnit) / 2];
  }
  __device__ uint32_t* residual_of(int token, int row) const {
    return reinterpret_cast<uint32_t*>(static_cast<T*>(p.residual) + token * s.n + row);
  }

  // The stream + what a product added up, rounded: a hand-over, and after the last layer the result.
  __device__ __forceinline__ void add_to_residual(int layer, int which, int of_token, int row, int number, float2 sum) {
    uint32_t& words = own(number, of_token, row);
    const float2 before = unpack_pair<T>(words);
    words = pack_pair<T>(before.x + sum.x, before.y + sum.y);
    if (which == kOut || layer < p.num_layers - 1) {
      hand_over(workspace() + (which == kOut ? buffers.o : buffers.d) + of_token * s.n + row, words, mark);
      return;
    }
    *residual_of(of_token, row) = words;
    // All CTAs have read it: who is here has read G, which they all write.
    if (of_token == 0 && row == 0) p.workspace[0] = mark;
  }

  // The stream as it is before the first layer, which is handed over like any other.
  __device__ void begin_residual(uint32_t before) {
    const int row = threadIdx.x % 4 * 2, token = threadIdx.x / 4 % kDecodeMaxTokens;
    const int number = threadIdx.x / (4 * kDecodeMaxTokens), item = first_item(products[kOut]) + number * ctas;
    if (token < p.num_tokens && item < products[kOut].items) {
      const int at = item * kUnit + row;
      own(number, token, row) = *residual_of(token, at);
      hand_over(workspace() + buffers.d + token * s.n + at, own(number, token, row), before);
    }
  }

  // ------------------------------------------------------------------------------------------ attention

  // Which part of whose keys this CTA has, the same in all layers; nothing if begin is not below end. And which head of
  // whose results it merges: of so many parts, 0 for a row of padding, -1 for nothing.
  struct Part {
    int token, kv_head, split, begin, end, length, slot;
    int merged_token, merged_head, merged_parts;
  };
  __device__ Part& part() { return *reinterpret_cast<Part*>(smem + layout.part); }

  __device__ int splits_of(int keys) const { return max(1, min(s.splits, (keys + kMinSplitKeys - 1) / kMinSplitKeys)); }
  __device__ static int keys_of_split(int keys, int splits) { return ((keys + splits - 1) / splits + 7) / 8 * 8; }

  // By one thread.
  __device__ void find_part() {
    Part mine = {cta / s.splits / s.kv_heads, cta / s.splits % s.kv_heads, cta % s.splits, 0, 0, 0, -1, 0, 0, -1};
    if (cta < p.num_tokens * s.heads) {
      mine.merged_token = cta / s.heads, mine.merged_head = cta % s.heads;
      const int keys = p.seqused_k[mine.merged_token], of_part = keys_of_split(keys, splits_of(keys));
      mine.merged_parts = keys > 0 ? (keys + of_part - 1) / of_part : 0;
    }
    if (mine.token < p.num_tokens) {
      mine.length = p.seqused_k[mine.token], mine.slot = p.slot_mapping[mine.token];
      const int keys = keys_of_split(mine.length, splits_of(mine.length));
      mine.begin = min(mine.length, mine.split * keys);
      mine.end = min(mine.length, mine.begin + keys);
    }
    part() = mine;
  }
  // What bring_head and row_of look up, to shared memory.
  __device__ void keep_tables() {
    const Part mine = part();
    if (mine.begin >= mine.end) return;
    const int position = p.positions[mine.token];
    const bool exists = position >= 0 && position < p.max_position;
#pragma unroll 1
    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
      reinterpret_cast<float*>(smem + layout.angles)[i] = exists ? p.cos_sin[int64_t{position} * HEAD_DIM + i] : NAN;
    }
    const int first = mine.begin >> s.block_shift, last = (mine.end - 1) >> s.block_shift;
#pragma unroll 1
    for (int i = threadIdx.x; i <= min(last - first, kMaxBlocks - 1); i += kThreads) {
      reinterpret_cast<int*>(smem + layout.blocks)[i] = p.block_table[mine.token * p.block_table_stride + first + i];
    }
  }

  // Where a key is in a cache of the layer.
  __device__ int64_t row_of(int key, const Part& of) const {
    const int page = key >> s.block_shift, known = page - (of.begin >> s.block_shift);
    const int block = known < kMaxBlocks ? reinterpret_cast<const int*>(smem + layout.blocks)[known]
                                         : p.block_table[of.token * p.block_table_stride + page];
    const int64_t at = (int64_t{block} << s.block_shift) + (key & (p.block_size - 1));
    return (at * s.kv_heads + of.kv_head) * HEAD_DIM;
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

  __device__ void attend(int layer);
  __device__ void merge();
  __device__ void compute();
};

// Scores and sums of this CTA's part: for each head of the group the largest score, the sum of probabilities and that
// of values, of all its warps, to whoever merges.
template <typename T, int HEAD_DIM>
__device__ void Decode<T, HEAD_DIM>::attend(int layer) {
  constexpr int CHUNKS = HEAD_DIM / 32;  // 16 bytes a lane of a row of K
  constexpr int HALVES = HEAD_DIM / 64;  // 16 bytes a lane of a row of V
  const Part& mine = part();
  if (mine.begin >= mine.end) return;
  const bool has_new = mine.end == mine.length;
  const int keys = keys_of_split(mine.end - mine.begin, kWarps);
  const int my_begin = mine.begin + warp * keys, my_end = min(mine.end, my_begin + keys);
  // Of 16 keys a lane has, of K, those of rows g and g + 8, dims 32 c + 8 t and on; of V keys 2t, 2t + 1 and the two 8
  // further on, dims 64 h + 8 g and on: two of them for each j are rows of the second product's A, and nothing is
  // transposed.
  const T* const keys_of_layer = static_cast<const T*>(p.layers[layer].k_cache) + 8 * t;
  const T* const values_of_layer = static_cast<const T*>(p.layers[layer].v_cache) + 8 * g;
  uint4 k[2][CHUNKS], v[4][HALVES];
  const auto load_keys = [&](int first) {  // the newest is not in the cache
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = first + 8 * j + g;
      const bool there = key < my_end && key != mine.length - 1;
      const T* row = there ? keys_of_layer + row_of(key, mine) : nullptr;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        k[j][c] = there ? load_early(reinterpret_cast<const uint4*>(row + 32 * c)) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  const auto load_values = [&](int first) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = first + 2 * t + j % 2 + j / 2 * 8;
      const bool there = key < my_end && key != mine.length - 1;
      const T* row = there ? values_of_layer + row_of(key, mine) : nullptr;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        v[j][h] = there ? load_early(reinterpret_cast<const uint4*>(row + 64 * h)) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  load_keys(my_begin);                        // while q is on its way
  if (HEAD_DIM == 64) load_values(my_begin);  // else there are no registers for them yet

  T* const heads = reinterpret_cast<T*>(smem + layout.heads);  // of q, and then the new key and value
#pragma unroll 1
  for (int i = warp; i < s.group + (has_new ? 2 : 0); i += kWarps) {
    const int head = i < s.group ? mine.kv_head * s.group + i : s.heads + (i - s.group) * s.kv_heads + mine.kv_head;
    const void* norm = nullptr;
    if (s.has_head_norms && i <= s.group) norm = i < s.group ? p.layers[layer].q_norm : p.layers[layer].k_norm;
    bring_head(mine.token, head * HEAD_DIM, i <= s.group, norm, heads + i * HEAD_DIM);
  }
  sync();
  const T* const new_key = heads + s.group * HEAD_DIM;
  if (has_new && mine.slot >= 0 && threadIdx.x < HEAD_DIM / 4) {
    const int of = threadIdx.x / (HEAD_DIM / 8), at = threadIdx.x % (HEAD_DIM / 8) * 8;
    T* row = static_cast<T*>(of == 0 ? p.layers[layer].k_cache : p.layers[layer].v_cache) +
             (int64_t{mine.slot} * s.kv_heads + mine.kv_head) * HEAD_DIM;
    store_pack<8>(row + at, load_pack<8>(new_key + of * HEAD_DIM + at));
  }

  const float scale = p.softmax_scale * 1.4426950408889634f;
  float largest = -INFINITY, sum = 0.0f;  // of head g; the sum of this lane's keys
  float out[HALVES][4][4] = {};           // of dims 64 h + 8 g + 2j and the next, each of heads 2t, 2t + 1

#pragma unroll 1
  for (int first = my_begin; first < my_end; first += kStepKeys) {
    if (first > my_begin) load_keys(first);
    if (first > my_begin && HEAD_DIM == 64) load_values(first);
    if (HEAD_DIM != 64) load_values(first);
    if (has_new && first + kStepKeys >= mine.length) {  // its place among them
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (first + 8 * j + g != mine.length - 1) continue;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) k[j][c] = *reinterpret_cast<const uint4*>(new_key + 32 * c + 8 * t);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + 2 * t + j % 2 + j / 2 * 8 != mine.length - 1) continue;
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
          v[j][h] = *reinterpret_cast<const uint4*>(new_key + HEAD_DIM + 64 * h + 8 * g);
        }
      }
    }
    float scores[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      uint4 q = make_uint4(0, 0, 0, 0);
      if (g < s.group) q = *reinterpret_cast<const uint4*>(heads + g * HEAD_DIM + 32 * c + 8 * t);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_m16n8k16<T>(scores[j], {q.x, 0, q.y, 0}, k[j][c].x, k[j][c].y);
        mma_m16n8k16<T>(scores[j], {q.z, 0, q.w, 0}, k[j][c].z, k[j][c].w);
      }
    }
    float now = largest;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = scores[i / 2][i % 2];
      score = first + i / 2 * 8 + 2 * t + i % 2 < my_end ? score * scale : -INFINITY;
      now = fmaxf(now, score);
    }
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
    const float shrink = exp2_approx(largest - now);
    largest = now;
    float probabilities[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) probabilities[i] = exp2_approx(scores[i / 2][i % 2] - now);
    sum = sum * shrink + (probabilities[0] + probabilities[1]) + (probabilities[2] + probabilities[3]);
    const uint32_t b[2] = {pack_pair<T>(probabilities[0], probabilities[1]),
                           pack_pair<T>(probabilities[2], probabilities[3])};
    const float shrinks[2] = {__shfl_sync(0xffffffffu, shrink, 8 * t), __shfl_sync(0xffffffffu, shrink, 8 * t + 4)};
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto word = [&](const uint4& of) { return j == 0 ? of.x : j == 1 ? of.y : j == 2 ? of.z : of.w; };
#pragma unroll
        for (int i = 0; i < 4; ++i) out[h][j][i] *= shrinks[i % 2];
        mma_m16n8k16<T>(
            out[h][j],
            {__byte_perm(word(v[0][h]), word(v[1][h]), 0x5410), __byte_perm(word(v[0][h]), word(v[1][h]), 0x7632),
             __byte_perm(word(v[2][h]), word(v[3][h]), 0x5410), __byte_perm(word(v[2][h]), word(v[3][h]), 0x7632)},
            b[0], b[1]);
      }
    }
  }

  // Of all warps.
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  constexpr int PITCH = HEAD_DIM + 4;
  float* const partials = reinterpret_cast<float*>(smem + layout.partial);
  float* const of_warp_heads = partials + warp * kDecodeMaxGroup * PITCH;
  if (2 * t < kDecodeMaxGroup) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int of = 0; of < 2; ++of) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          *reinterpret_cast<float4*>(of_warp_heads + (2 * t + of) * PITCH + 64 * h + 8 * g + 2 * j) =
              make_float4(out[h][j][of], out[h][j][of + 2], out[h][j + 1][of], out[h][j + 1][of + 2]);
        }
      }
    }
  }
  if (t == 0 && g < s.group)
    *reinterpret_cast<float2*>(of_warp_heads + g * PITCH + HEAD_DIM) = make_float2(largest, sum);
  sync();
  // A lane for each warp and head: how much its part counts.
  const int of_head = lane % kDecodeMaxGroup;
  float2 state = make_float2(-INFINITY, 0.0f);
  if (of_head < s.group) {
    state = *reinterpret_cast<const float2*>(partials + (lane / kDecodeMaxGroup * kDecodeMaxGroup + of_head) * PITCH +
                                             HEAD_DIM);
  }
  float most = state.x;
#pragma unroll
  for (int distance = kDecodeMaxGroup; distance < 32; distance *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, distance));
  }
  const float weight = state.y == 0.0f ? 0.0f : exp2_approx(state.x - most);  // 0: it had no key
  float total = weight * state.y;
#pragma unroll
  for (int distance = kDecodeMaxGroup; distance < 32; distance *= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, distance);
  }
#pragma unroll 1
  for (int first = 0; first < s.group * (HEAD_DIM / 2); first += kThreads) {
    const int i = first + threadIdx.x, head = i / (HEAD_DIM / 2), pair = i % (HEAD_DIM / 2);
    float2 all = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float of_warp = __shfl_sync(0xffffffffu, weight, w * kDecodeMaxGroup + head % kDecodeMaxGroup);
      const float2 part = *reinterpret_cast<const float2*>(
          partials + (w * kDecodeMaxGroup + head % kDecodeMaxGroup) * PITCH + 2 * pair);
      all.x += of_warp * part.x;
      all.y += of_warp * part.y;
    }
    const float of_all = __shfl_sync(0xffffffffu, most, head % kDecodeMaxGroup);
    const float sum_of_all = __shfl_sync(0xffffffffu, total, head % kDecodeMaxGroup);
    if (head < s.group) {
      uint32_t* const target = partial_of(mine.token, mine.kv_head * s.group + head, mine.split);
      hand_over(target + 4 * pair, all.x, all.y, mark);
      if (pair == 0) hand_over(target + 4 * (HEAD_DIM / 2), of_all, sum_of_all, mark);
    }
  }
}

// A CTA for each head of a token, a warp for every eighth of its parts. What it leaves in shared memory nobody writes
// before the next barrier of all: the product behind it has one.
template <typename T, int HEAD_DIM>
__device__ void Decode<T, HEAD_DIM>::merge() {
  constexpr int PAIRS = HEAD_DIM / 64, PARTS = kMaxSplits / kWarps;
  const int of_token = part().merged_token, head = part().merged_head, merged_parts = part().merged_parts;
  if (merged_parts < 0) return;
  constexpr int PITCH = (HEAD_DIM / 2 + 1) * 4;  // words of a part
  const uint32_t* const first_part = partial_of(of_token, head, 0);
  const uint32_t* const mine = first_part + warp * PITCH + 4 * lane;
  uint4 early[PARTS][PAIRS];
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      if (warp + i * kWarps < merged_parts) early[i][j] = look(mine + i * kWarps * PITCH + 128 * j);
    }
  }
  float2 state = make_float2(-INFINITY, 0.0f);
  if (lane < merged_parts) {
    const uint32_t* source = first_part + lane * PITCH + PITCH - 4;
    const uint2 words = take(source, mark, look(source));
    state = make_float2(__uint_as_float(words.x), __uint_as_float(words.y));
  }
  const float most = warp_reduce(state.x, [](float a, float b) { return fmaxf(a, b); });
  const float weight = lane < merged_parts ? exp2_approx(state.x - most) : 0.0f;
  const float total = warp_reduce(weight * state.y, [](float a, float b) { return a + b; });
  float2 out[PAIRS] = {};
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    if (warp + i * kWarps >= merged_parts) break;
    const float counts = __shfl_sync(0xffffffffu, weight, warp + i * kWarps);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const uint2 words = take(mine + i * kWarps * PITCH + 128 * j, mark, early[i][j]);
      out[j].x += counts * __uint_as_float(words.x);
      out[j].y += counts * __uint_as_float(words.y);
    }
  }
  float2* const partials = reinterpret_cast<float2*>(smem + layout.merged);
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) partials[warp * (HEAD_DIM / 2) + lane + 32 * j] = out[j];
  sync();
  if (warp < PAIRS) {
    float2 all = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = partials[w * (HEAD_DIM / 2) + threadIdx.x];
      all.x += part.x;
      all.y += part.y;
    }
    const float factor = merged_parts > 0 ? __fdividef(1.0f, total) : 0.0f;
    const int at = of_token * s.out_columns + head * HEAD_DIM + 2 * threadIdx.x;
    hand_over(workspace() + buffers.a + at, pack_pair<T>(all.x * factor, all.y * factor), mark);
  }
}

template <typename T, int HEAD_DIM>
__device__ void Decode<T, HEAD_DIM>::compute() {
  const uint32_t before = p.workspace[0] + 1;  // what is there at first has 0
  begin_residual(before);
  if (threadIdx.x == 0) find_part();
  sync();
  keep_tables();
  sync();
#pragma unroll 1
  for (int layer = 0; layer < p.num_layers; ++layer) {
    mark = before + layer + 1;
#pragma unroll 1  // the code of a layer should stay in the instruction caches
    for (int which = kQkv; which <= kDown; ++which) {
      multiply(layer, which);
      if (which != kQkv) continue;
      attend(layer);
      merge();
    }
  }
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kThreads + 32, 1) decode_layers_kernel(const __grid_constant__ Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(128) unsigned char smem[];
  Decode<T, HEAD_DIM> decode(args, smem);
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int i = 0; i < decode.layout.stages; ++i) {
      decode.full(i).init(1);
      decode.empty(i).init(kWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (decode.warp == kWarps) {
    decode.copy_weights();
  } else {
    decode.compute();
  }
#endif
}

int num_ctas(const DecodeLayersParams& p) {
  const int items = p.intermediate_size / kUnit;  // all CTAs must have a row of gates
  return p.num_sms < items ? p.num_sms : items;
}

template <typename T, int HEAD_DIM>
cudaError_t launch(const DecodeLayersParams& p, cudaStream_t stream) {
  const Args args(p, num_ctas(p));
  if (args.layout.stages < 2 || args.buffers.end > p.workspace_words) return cudaErrorInvalidValue;
  const auto kernel = decode_layers_kernel<T, HEAD_DIM>;
  const cudaError_t error = allow_shared_memory(kernel, args.layout.end);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas(p)));
  config.blockDim = dim3(kThreads + 32);
  config.dynamicSmemBytes = static_cast<size_t>(args.layout.end);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

cudaError_t decode_layers_sm90(const DecodeLayersParams& p, cudaStream_t stream) {
  const bool fits = p.num_tokens >= 1 && p.num_tokens <= kDecodeMaxTokens && p.num_layers >= 1 &&
                    p.num_layers <= kDecodeMaxLayers && p.hidden_size % 64 == 0 && p.intermediate_size % 64 == 0 &&
                    p.num_heads % p.num_kv_heads == 0 && p.num_heads / p.num_kv_heads <= kDecodeMaxGroup &&
                    p.num_heads * p.head_dim % 64 == 0 && (p.block_size & (p.block_size - 1)) == 0 &&
                    num_ctas(p) >= p.num_tokens * p.num_heads && p.hidden_size / kUnit <= kOwnUnits * num_ctas(p);
  if (!fits) return cudaErrorInvalidValue;
  return dispatch_half(p.dtype, [&](auto example) {
    using T = decltype(example);
    if (p.head_dim == 64) return launch<T, 64>(p, stream);
    if (p.head_dim == 128) return launch<T, 128>(p, stream);
    return cudaErrorInvalidValue;
  });
}

}  // namespace fastattn
