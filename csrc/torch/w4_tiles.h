// Weights of 4 bits in tiles (fastattn/reference/w4_tiles.py): what operators check of them, and tiles for the length
// of a call of a weight that lies as checkpoints have it.
#pragma once

#include "gemm/gemm_sm90_w4.h"
#include "gemm/w4_tiles.h"
#include "torch/checks.h"

namespace fastattn {

inline bool in_tiles(const Tensor& weight_packed) { return weight_packed.dim() == 3; }

// Bytes of FP4 or words of INT4, whose scales are checked as those of rows are. Gives N.
inline int64_t check_w4_tiles(const Checks& checks, const Tensor& packed, const Tensor& scale, int64_t group_size,
                              int64_t k, bool is_int4) {
  const auto whole = [&](const char* name, const Tensor& t) {
    checks.that(t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0,
                std::string(name) + " is not contiguous or not 16-byte aligned, as tiles must be");
  };
  checks.that(k > 0 && k % 64 == 0,
              "x has K = " + std::to_string(k) + ", expected a multiple of 64 above 0 with weight_packed in tiles");
  checks.shape("weight_packed", packed, {kAny, k / 64, is_int4 ? 128 : 512});
  whole("weight_packed", packed);
  if (is_int4) {
    checks.that(group_size % 64 == 0 || group_size == k, "group_size is " + std::to_string(group_size) +
                                                             ", expected a multiple of 64 with weight_packed in tiles");
  } else {
    checks.shape("weight_scale", scale, {packed.size(0), k / 64, 1024 / group_size});
    whole("weight_scale", scale);
  }
  const int capability = capability_of(packed);
  checks.that(capability == 90,
              "weight_packed is in tiles, which are for GPUs of compute capability 9.0; this one has " +
                  std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  return packed.size(0) * 16;
}

// p, which has a weight's rows, then has tiles. They live as long as what is given back.
struct W4Tiles {
  Tensor tiles;
  std::optional<Tensor> scales, global_scale;
};

inline W4Tiles put_in_tiles(const char* op, GemmSm90W4Params& p, W4Order order, int64_t group_size,
                            const Tensor& like) {
  const bool is_int4 = order == W4Order::kInt4, relative = !is_int4 && group_size == 32;
  W4Tiles made{empty(like, {p.n * p.k / 8}, ScalarType::Int), std::nullopt, std::nullopt};
  W4TilesParams params;
  params.packed = static_cast<const uint8_t*>(p.weight);
  params.packed_stride = p.weight_stride;
  params.global_scale = p.global_scale;
  params.order = order;
  params.n = p.n;
  params.k = p.k;
  params.tiles = static_cast<uint32_t*>(made.tiles.data_ptr());
  p.weight = made.tiles.data_ptr();
  if (!is_int4) {
    params.scale = static_cast<const uint8_t*>(p.weight_scale);
    params.scale_stride = p.scale_stride;
    params.group_size = group_size;
    made.scales = empty(like, {p.n * p.k / group_size}, ScalarType::Byte);
    params.scale_tiles = static_cast<uint8_t*>(made.scales->data_ptr());
    p.weight_scale = params.scale_tiles;
  }
  if (relative) {
    made.global_scale = empty(like, {p.n}, ScalarType::Float);
    params.scaled_globally = static_cast<float*>(made.global_scale->data_ptr());
    p.global_scale = params.scaled_globally;
  }
  check_launch(op, w4_tiles(params, stream_of(like)));
  return made;
}

}  // namespace fastattn
