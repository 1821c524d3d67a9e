// What a CTA of the Hopper attention kernel has in shared memory, and in how many stages.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "arch/mbarrier.cuh"
#include "attention/flash_fwd_sm90_8bit.cuh"
#include "attention/flash_fwd_sm90_tiles.cuh"

namespace fastattn {

// Elements of a row that lie side by side in shared memory: 128 bytes, or 64. Rows between the two are padded to 128,
// so that each is one box of the copy engine.
template <int BYTES>
constexpr bool kIsWidePanel = BYTES % 128 == 0 || (BYTES > 64 && BYTES < 128);
template <typename T, int HEAD_DIM>
constexpr int kPanelOf = (kIsWidePanel<HEAD_DIM * sizeof(T)> ? 128 : 64) / sizeof(T);
// With whole panels; the products leave out what a head dim of 80, in fp8 also of 96, is short of them.
template <typename T, int HEAD_DIM>
constexpr int kStoredDim = (HEAD_DIM + kPanelOf<T, HEAD_DIM> - 1) / kPanelOf<T, HEAD_DIM> * kPanelOf<T, HEAD_DIM>;

// fp8 only: V as it comes, before it is turned around.
template <typename T, int BYTES>
struct FlashFwdSm90RawValues {};
template <int BYTES>
struct FlashFwdSm90RawValues<__nv_fp8_e4m3, BYTES> {
  alignas(1024) unsigned char v_raw[2][BYTES];
  MBarrier v_turned[2];
};

// Pages of 8 bits only: K and V as they come, in turns, before they are widened.
template <int STAGES, int BYTES>
struct FlashFwdSm90RawBlocks {
  alignas(1024) unsigned char raw[STAGES][BYTES];
};
template <int BYTES>
struct FlashFwdSm90RawBlocks<0, BYTES> {};

// Rows of O on their way out, 16 of each warp.
template <int WARPS, int COLUMNS>
struct FlashFwdSm90StagedRows {
  alignas(16) unsigned char rows[WARPS][16 * (COLUMNS + 8) * 2];
};
template <int WARPS>
struct FlashFwdSm90StagedRows<WARPS, 0> {};

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool WIDENS>
struct FlashFwdSm90Sizes {
  static constexpr int BLOCK_M = 64 * NUM_CONSUMERS;
  static constexpr int kTileStages = 2;
  static constexpr int kBytesQ = BLOCK_M * kStoredDim<T, HEAD_DIM> * sizeof(T);
  // V as it comes; in fp8 a product reads it turned around, in whole panels of keys, beside.
  static constexpr int kSizeLoadedV = BLOCK_N * kStoredDim<T, V_HEAD_DIM>;
  static constexpr int kSizeV = sizeof(T) == 1 ? (BLOCK_N + 63) / 64 * 64 * V_HEAD_DIM : kSizeLoadedV;
  static constexpr int kBytesV = (kSizeV + (sizeof(T) == 1 ? kSizeLoadedV : 0)) * sizeof(T);
  static constexpr int kBytesKv = BLOCK_N * kStoredDim<T, HEAD_DIM> * sizeof(T) + kBytesV;
  static constexpr int kMostBytes = 224 * 1024;
  static constexpr int kBytesRaw = WIDENS ? BLOCK_N * HEAD_DIM : 0;
  static constexpr int kStages = sizeof(T) == 2 && 2 * kBytesQ + 4 * (kBytesKv + kBytesRaw) <= kMostBytes ? 4 : 2;
  static constexpr int kStagesRaw = !WIDENS                                                          ? 0
                                    : 2 * kBytesQ + kStages * kBytesKv + 4 * kBytesRaw <= kMostBytes ? 4
                                                                                                     : 2;
  static constexpr int kStagesQ = 2 * kBytesQ + kStages * kBytesKv + kStagesRaw * kBytesRaw <= kMostBytes ? 2 : 1;
  // Columns of O that rows leave by at a time through shared memory: what there is place for; 0: from registers. Not
  // timed with 128 columns, nor where V's head dim is its own.
  static constexpr int staged_bytes(int columns) { return 4 * NUM_CONSUMERS * 16 * (columns + 8) * 2; }
  static constexpr int kFreeBytes = 226 * 1024 - kStagesQ * kBytesQ - kStages * kBytesKv;
  static constexpr bool kStages16Bits = sizeof(T) == 2 && !WIDENS && HEAD_DIM == V_HEAD_DIM && V_HEAD_DIM % 128 != 0;
  static constexpr int kStagedColumns = !kStages16Bits                               ? 0
                                        : staged_bytes(V_HEAD_DIM) <= kFreeBytes     ? V_HEAD_DIM
                                        : staged_bytes(V_HEAD_DIM / 2) <= kFreeBytes ? V_HEAD_DIM / 2
                                                                                     : 0;
};

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool WIDENS>
struct FlashFwdSm90Storage
    : FlashFwdSm90Sizes<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, WIDENS>,
      FlashFwdSm90RawValues<T,
                            FlashFwdSm90Sizes<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, WIDENS>::kSizeLoadedV>,
      FlashFwdSm90RawBlocks<FlashFwdSm90Sizes<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, WIDENS>::kStagesRaw,
                            BLOCK_N * HEAD_DIM>,
      FlashFwdSm90StagedRows<4 * NUM_CONSUMERS, FlashFwdSm90Sizes<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N,
                                                                  WIDENS>::kStagedColumns> {
  using Sizes = FlashFwdSm90Sizes<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, WIDENS>;
  static constexpr int kStages = Sizes::kStages, kStagesQ = Sizes::kStagesQ, kTileStages = Sizes::kTileStages;
  static constexpr int BLOCK_M = Sizes::BLOCK_M;

  alignas(1024) T q[kStagesQ][BLOCK_M * kStoredDim<T, HEAD_DIM>];
  alignas(1024) T k[kStages][BLOCK_N * kStoredDim<T, HEAD_DIM>];
  alignas(1024) T v[kStages][Sizes::kSizeV];
  MBarrier q_full[kStagesQ], q_empty[kStagesQ];
  MBarrier k_full[kStages], k_empty[kStages];
  MBarrier v_full[kStages], v_empty[kStages];
  MBarrier v_loaded[kStages];  // a V whose tail must be cleared, or that must be turned, before it is full
  MBarrier tile_full[kTileStages], tile_empty[kTileStages];
  FlashTile tile[kTileStages];
  MBarrier tile_ends;  // the tile's last keys are being fetched
};

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N>
struct FlashFwdSm90WideningStorage : FlashFwdSm90Storage<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, true> {
  using Sizes = FlashFwdSm90Sizes<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, true>;
  MBarrier raw_full[Sizes::kStagesRaw], raw_empty[Sizes::kStagesRaw];
  MBarrier q_loaded[Sizes::kStagesQ];  // queries that must become fp16 before they are full
  FlashTokenFactors<Sizes::kStages, BLOCK_N> factors;
};

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool WIDENS>
using FlashFwdSm90StorageOf =
    std::conditional_t<WIDENS, FlashFwdSm90WideningStorage<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N>,
                       FlashFwdSm90Storage<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, false>>;

}  // namespace fastattn
