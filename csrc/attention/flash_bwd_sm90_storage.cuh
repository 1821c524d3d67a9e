// What the Hopper attention gradient keeps in shared memory, and in how many stages.
#pragma once

#include "arch/mbarrier.cuh"
#include "attention/flash_bwd_sm90_tiles.cuh"

namespace fastattn {

template <typename T, int HEAD_DIM>
struct FlashBwdSm90Storage {
  static constexpr FlashBwdSm90Tile kTile = flash_bwd_sm90_tile(HEAD_DIM);
  static constexpr int BLOCK_M = kTile.block_m, BLOCK_N = kTile.block_n;
  static constexpr bool kSharedKeys = BLOCK_N == 64;
  static constexpr FlashBwdSm90Stages kStages = flash_bwd_sm90_stages(HEAD_DIM);
  static constexpr int kStagesQ = kStages.q, kStagesDo = kStages.dout, kStagesDs = kStages.ds, kStagesK = kStages.k;
  static constexpr int kTileStages = 2;
  static constexpr int PANEL = flash_bwd_sm90_panel(HEAD_DIM);  // elements of a row that lie side by side

  alignas(1024) T q[kStagesQ][BLOCK_M * HEAD_DIM];
  alignas(1024) T dout[kStagesDo][BLOCK_M * HEAD_DIM];
  alignas(1024) T k[kStagesK][BLOCK_N * HEAD_DIM];
  alignas(1024) T v[BLOCK_N * HEAD_DIM];
  alignas(1024) T ds[kStagesDs][BLOCK_N * BLOCK_M];            // panels of 64 query rows, a key's side by side
  alignas(1024) T probs[kSharedKeys ? BLOCK_N * BLOCK_M : 8];  // P likewise
  alignas(128) float lse_log2[kStagesQ][BLOCK_M];
  alignas(128) float delta[kStagesDo][BLOCK_M];
  MBarrier q_full[kStagesQ], q_empty[kStagesQ];
  MBarrier dout_full[kStagesDo], dout_empty[kStagesDo];
  MBarrier k_full[kStagesK], k_empty[kStagesK], v_full, v_empty;
  MBarrier ds_full[kStagesDs], ds_empty[kStagesDs], probs_full;
  MBarrier tile_full[kTileStages], tile_empty[kTileStages];
  FlashBwdTile tile[kTileStages];
};

}  // namespace fastattn
