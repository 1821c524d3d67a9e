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
#include "decoder/decode_layers_sm90_layout.h"
#include "decoder/hand_over.cuh"

namespace fastattn {
namespace {

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

}  // namespace
}  // namespace fastattn

#include "decoder/decode_layers_sm90_attention.cuh"

namespace fastattn {
namespace {

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
