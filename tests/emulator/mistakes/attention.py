"""Mistakes in the attention kernels."""

from __future__ import annotations

from tests.emulator.mistakes.mistake import Header, Mistake

FWD = Header("attention/flash_fwd_sm90.cuh", "flash_fwd_sm90")
FWD_TILES = Header("attention/flash_fwd_sm90_tiles.cuh", "flash_fwd_sm90")
FWD_STORAGE = Header("attention/flash_fwd_sm90_storage.cuh", "flash_fwd_sm90")
BWD = Header("attention/flash_bwd_sm90.cuh", "flash_bwd_sm90")
DECODE = Header("attention/paged_decode.cuh", "paged_decode")
DECODE_CLUSTER = Header("attention/paged_decode_cluster.cuh", "paged_decode")
DECODE_WARP = Header("attention/paged_decode_warp.cuh", "paged_decode")
DECODE_SHORT = Header("attention/paged_decode_short.cuh", "paged_decode")
SM80 = Header("attention/flash_sm80.cuh", "flash_sm80")
MASK = Header("attention/mask.cuh", "paged_decode")

MISTAKES = [
    Mistake(
        "an arrival is left out",
        FWD,
        """    pin_registers(probs);
    release_v();
  };""",
        """    pin_registers(probs);
    v_ring.advance();
  };""",
        "flash_fwd_sm90_hd128.cu",
        "128",
        "deadlock",
    ),
    Mistake(
        "V is released before the product that reads it is over",
        FWD,
        """      wgmma_wait<1>();
      pin_registers(acc);
      pin_registers(probs);
      release_v();""",
        """      release_v();
      wgmma_wait<1>();
      pin_registers(acc);
      pin_registers(probs);""",
        "flash_fwd_sm90_hd128.cu",
        "128",
        "expected",
        call=249,
    ),
    Mistake(
        "a group that passes over a block does not end its turn",
        FWD,
        """      take_turn();
      end_turn();
      release_k();""",
        """      take_turn();
      release_k();""",
        "flash_fwd_sm90_hd128.cu",
        "128",
        "deadlock",
    ),
    Mistake(
        "the second half of a row leaves where the first one did",
        FWD,
        "        Out* next = out + first;\n",
        "        Out* next = out;\n",
        "flash_fwd_sm90_hd192.cu",
        "192",
        "expected",
        call=13,
    ),
    # Made once: behind the last tile the bits of that one told groups to go on.
    Mistake(
        "behind the last tile there seem to be rows",
        FWD,
        "      tile.whole_groups = 0;\n",
        "",
        "flash_fwd_sm90_hd64.cu",
        "64",
        "deadlock",
        call=28,
    ),
    Mistake(
        "boxes of a block come from the page of another one",
        FWD_TILES,
        "pages[i] = __shfl_sync(0xffffffffu, page, first + i);",
        "pages[i] = __shfl_sync(0xffffffffu, page, first);",
        "flash_fwd_sm90_hd128.cu",
        "128",
        "expected",
        call=49,
    ),
    Mistake(
        "keys whose panels lie by eight rows are read as if whole panels lay behind each other",
        FWD,
        "EIGHTS ? PANELS : 1>(smem.k[0], 0)",
        "1>(smem.k[0], 0)",
        "flash_fwd_sm90_hd128.cu",
        "8",
        "expected",
    ),
    Mistake(
        "of values whose panels lie by eight rows others are cleared than have no key",
        FWD,
        "chunks[EIGHTS ? i + i / V_PANEL * (V_PANELS - 1) * V_PANEL : i]",
        "chunks[i]",
        "flash_fwd_sm90_hd128.cu",
        "8",
        "expected",
    ),
    Mistake(
        "each lane copies a block",
        FWD_TILES,
        "if (!elect_lane()) continue;",
        "elect_lane();",
        "flash_fwd_sm90_hd128.cu",
        "128",
        "bytes missing",
    ),
    # Undefined, and every test passed on GPUs; synccheck found it.
    Mistake(
        "each warp decides for itself whether it waits for products",
        FWD,
        "if (any_of_group(kVoteOfGroup + consumer, moved | (parts[0]",
        "if ((moved | (parts[0]",
        "flash_fwd_sm90_fp8_hd128.cu",
        "128",
        "wait for products at different places",
        call=7,
    ),
    Mistake(
        "negative scores of fp8 are compared as integers",
        FWD,
        "if (__any_sync(0xffffffffu, signs < 0)) {",
        "if (__any_sync(0xffffffffu, false)) {",
        "flash_fwd_sm90_fp8_hd128.cu",
        "128",
        "expected",
        call=11,
    ),
    Mistake(
        "V of head dim 96, as it comes, has no place for what its last panel is padded with",
        FWD_STORAGE,
        "kSizeLoadedV = BLOCK_N * kStoredDim<T, V_HEAD_DIM>",
        "kSizeLoadedV = BLOCK_N * V_HEAD_DIM",
        "flash_fwd_sm90_fp8_hd96.cu",
        "96",
        "an arrival too many",
        call=2,
    ),
    # Wrong rows, or an end that never comes: who is first, the schedule decides.
    Mistake(
        "a block is widened over one that a product still reads",
        FWD,
        "        empty.wait(parity ^ 1);\n",
        "",
        "flash_fwd_sm90_8bit_hd128.cu",
        "128",
        "in the call: seed",
        call=59,
    ),
    Mistake(
        "P is multiplied by the factors of another block",
        FWD,
        "slot_of(k_ring.count - 1)",
        "slot_of(k_ring.count)",
        "flash_fwd_sm90_8bit_hd128.cu",
        "128",
        "expected",
        call=4,
    ),
    Mistake(
        "O is not brought to the larger factors of a block",
        FWD,
        "for (float& x : acc[t]) x *= ratio;",
        "for (float& x : acc[t]) x *= 1.0f;",
        "flash_fwd_sm90_8bit_hd128.cu",
        "128",
        "expected",
        call=92,
    ),
    Mistake(
        "Q is released before the product that reads it is over",
        BWD,
        """      wgmma_wait<1>();
      release(smem.q_empty[(q_ring.count - 1) % Storage::kStagesQ]);""",
        """      release(smem.q_empty[(q_ring.count - 1) % Storage::kStagesQ]);
      wgmma_wait<1>();""",
        "flash_bwd_sm90_hd128.cu",
        "128",
        "expected",
        call=7,
    ),
    # A form of the kernel had this, and every test passed on GPUs.
    Mistake(
        "a warp writes dS while a product of its own group reads it",
        BWD,
        "      release(smem.probs_full);  // this",
        "      for (int i = 0; i < 4 && warp_idx % 4 == 0; ++i) release(smem.probs_full);  // this",
        "flash_bwd_sm90_hd256.cu",
        "256",
        "expected",
    ),
    Mistake(
        "a group writes dS while the other one's product reads it",
        BWD,
        "    smem.ds_empty[ds_stage].wait(ds_ring.parity() ^ 1);\n",
        "",
        "flash_bwd_sm90_hd128.cu",
        "128",
        "expected",
    ),
    Mistake(
        "a split goes on with the sums of the one before",
        DECODE,
        "    if constexpr (INVARIANT) products.begin(p);\n  }\n",
        "  }\n",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mistake(
        "splits are added up into 16 bits where the output has 8",
        DECODE,
        "  const DecodeOutput<T, Mask> output(p, plan, ended, plan.seq_idx);\n",
        """  PagedDecodeParams other = p;
  other.out_scale = nullptr;
  const DecodeOutput<T, Mask> output(other, plan, ended, plan.seq_idx);
""",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=37,
    ),
    Mistake(
        "a copy is not waited for",
        DECODE,
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        "paged_decode_hd64.cu",
        "64",
        "ended before its copies did",
    ),
    Mistake(
        "the next sequence's Q comes while other lanes read this one's",
        DECODE,
        "        __syncwarp();  // the next sequence's Q may come now\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=24,
    ),
    Mistake(
        "a sequence keeps the Q of the one before",
        DECODE,
        "      begins_ = true;\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mistake(
        "stages are loaded while other warps read results from them",
        DECODE,
        "    team.sync();  // the stages are free again\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=24,
    ),
    Mistake(
        "a row of Q that another warp loads is not waited for",
        DECODE_CLUSTER,
        "      __syncthreads();  // Q has come\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=17,
    ),
    Mistake(
        "values are loaded while other warps still multiply by those before",
        SM80,
        "    __syncthreads();\n    load_kv(kv.v, ",
        "    load_kv(kv.v, ",
        "flash_sm80_hd64.cu",
        "64",
        "expected",
    ),
    Mistake(
        "keys of a tree are taken for ones that all of its tokens see",
        MASK,
        "range.end = k_len - q_len;",
        "range.end = k_len;",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=29,
    ),
    Mistake(
        "a window over a tree begins where it would over a chain",
        MASK,
        "words == nullptr ? first : 0",
        "first",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=113,
    ),
    Mistake(
        "a warp that has a sequence alone gives results to rows that have none",
        DECODE_WARP,
        "const bool exists = row < output.num_rows;",
        "const bool exists = true;",
        "paged_decode_8bit_hd64.cu",
        "64",
        "expected",
        call=138,
    ),
    Mistake(
        "the warps' results are added up before all are there",
        DECODE_SHORT,
        "      __syncthreads();\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=7,
    ),
    Mistake(
        "a CTA says that its barrier is there before it is",
        DECODE_SHORT,
        """    smem.inbox_full.init(1);
    fence_barrier_init();
    smem.inbox_full.arrive_expect_bytes((pairs_of(rank) << p.cluster_log2) * sizeof(float4));
  }
  cluster_arrive();
""",
        """  }
  cluster_arrive();
  if (threadIdx.x == 0) {
    smem.inbox_full.init(1);
    smem.inbox_full.arrive_expect_bytes((pairs_of(rank) << p.cluster_log2) * sizeof(float4));
  }
""",
        "paged_decode_hd64.cu",
        "64",
        "was not initialized",
        27,
    ),
    Mistake(
        "a tile of few keys takes those behind the last one",
        DECODE_SHORT,
        "place_rows(k_len - 1 - first_key)",
        "place_rows(15)",
        "paged_decode_hd64.cu",
        "64",
        "expected",
        call=7,
    ),
]
