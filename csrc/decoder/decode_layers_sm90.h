// All layers of a Llama-like decoder for a few tokens, as one launch. The kernel is in decode_layers_sm90.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

constexpr int kDecodeMaxLayers = 128;
constexpr int kDecodeMaxTokens = 4;
constexpr int kDecodeMaxGroup = 4;  // heads of a KV head

// Weights as decoder layers have them on a GPU: rows contiguous, the norm in front folded in, gates and ups in turns of
// eight rows.
struct DecodeLayer {
  const void* qkv = nullptr;       // ((H + 2 Hk) D, N)
  const void* qkv_bias = nullptr;  // ((H + 2 Hk) D) or null
  const void* q_norm = nullptr;    // (D) or null
  const void* k_norm = nullptr;
  const void* out = nullptr;      // (N, H D)
  const void* gate_up = nullptr;  // (2 I, N)
  const void* down = nullptr;     // (N, I)
  void* k_cache = nullptr;        // (num_blocks, block_size, Hk, D) contiguous
  void* v_cache = nullptr;
};

// What belongs to a layer's weights where they are NVFP4 in tiles (fastattn/reference/w4_tiles.py), codes in the places
// of the matrices above, gates in front of all ups, no norm folded in: scales in tiles, what sums are divided by,
// (rows), and the norms' weights (N).
struct DecodeLayerTiles {
  const uint8_t* scales[4] = {};  // of qkv, out, gate_up, down
  const float* global_scales[4] = {};
  const void* input_norm = nullptr;
  const void* mlp_norm = nullptr;
};

struct DecodeLayersParams {
  DecodeLayer layers[kDecodeMaxLayers];
  const DecodeLayerTiles* tiles = nullptr;  // of each layer, in the host's memory; null: weights in 16 bits
  bool tiles_of_fours = false;              // in order 8
  void* residual = nullptr;                 // (T, N) contiguous, in and out; with token_ids out only
  const float* cos_sin = nullptr;           // (max_position, D)
  const int32_t* positions = nullptr;       // (T)
  const int32_t* slot_mapping = nullptr;    // (T), -1: its key and value are not kept
  const int32_t* seqused_k = nullptr;       // (T), this token counted; 0: a row of padding
  const int32_t* block_table = nullptr;     // (T, max_blocks)
  uint32_t* workspace = nullptr;            // zeros at first; words: fastattn.ops.decode_layers_workspace
  // With a head: the stream begins with rows of the embeddings, and logits are made of what it ends with.
  const int32_t* token_ids = nullptr;  // (T), below 0: drawn[-1 - id]; null: no head
  const int32_t* drawn = nullptr;      // (num_drawn)
  const void* embedding = nullptr;     // (V, N)
  const void* final_norm = nullptr;    // (N)
  const void* head = nullptr;          // (V, N)
  void* logits = nullptr;              // (T, V), all of them contiguous
  int32_t num_drawn = 0;
  int32_t vocab_size = 0;  // V, a multiple of 8
  int64_t block_table_stride = 0;
  int64_t workspace_words = 0;
  int32_t max_position = 0;
  int32_t num_layers = 0;
  int32_t num_tokens = 0;
  int32_t hidden_size = 0;        // N
  int32_t intermediate_size = 0;  // I
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_size = 0;
  int32_t num_sms = 0;
  float softmax_scale = 0.0f;
  float norm_eps = 0.0f;
  float qk_norm_eps = 0.0f;
  float gate_linear = 0.0f, gate_cubic = 0.0f;  // GemmSm90Params has the same
  DType dtype = DType::kBFloat16;
};

// Needs D 64 or 128 (of tiles 128, bf16), H / Hk up to kDecodeMaxGroup, N, I and H D multiples of 64, a block_size that
// is a power of two, and a workspace and shared memory that are large enough; cudaErrorInvalidValue otherwise. At most
// kDecodeMaxTokens tokens.
cudaError_t decode_layers_sm90(const DecodeLayersParams& params, cudaStream_t stream);
cudaError_t decode_layers_of_tiles_sm90(const DecodeLayersParams& params,
                                        cudaStream_t stream);  // of what that has checked

}  // namespace fastattn
