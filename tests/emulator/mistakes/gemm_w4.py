"""Mistakes in the GEMMs for weights of four bits."""

from __future__ import annotations

from tests.emulator.mistakes.mistake import Header, Mistake

W4_PRODUCTS = Header("gemm/gemm_sm90_w4_products.cuh", "gemm_sm90_w4")
W4 = Header("gemm/gemm_sm90_w4.cuh", "gemm_sm90_w4")
W4_TILES = Header("gemm/gemm_sm90_w4_tiles.cuh", "gemm_sm90_w4_tiles")
W4_SOME = Header("gemm/gemm_sm90_w4_some_rows.cuh", "gemm_sm90_w4_tiles")
W4_MANY = Header("gemm/gemm_sm90_w4_many_rows.cuh", "gemm_sm90_w4")
W4_TILED = Header("gemm/gemm_sm90_w4_tiled_operands.cuh", "gemm_sm90_w4")

MISTAKES = [
    Mistake(
        "weights become numbers in registers that a product still reads",
        W4_PRODUCTS,
        """    wgmma_wait<1>();
    pin_registers(fragments);""",
        """    wgmma_wait<2>();
    pin_registers(fragments);""",
        "gemm_sm90_w4_nvfp4.cu",
        "16",
        "expected",
    ),
    Mistake(
        "a stage is released while a product reads x there",
        W4,
        "if (i == 1 && position.count > 0",
        "if (i == 0 && position.count > 0",
        "gemm_sm90_w4_nvfp4.cu",
        "64",
        "expected",
    ),
    Mistake(
        "scales of the stage before are taken",
        W4,
        """      scales.take();
      scales.load(p, first_n + row, min(step + 1, end_step - 1), lane);""",
        """      scales.take();
      scales.load(p, first_n + row, step, lane);""",
        "gemm_sm90_w4_nvfp4.cu",
        "16",
        "expected",
    ),
    Mistake(
        "a warp's stage is loaded again before it is multiplied",
        W4_TILES,
        "      smem.full[warp_idx][stage_idx].wait(parity);\n",
        "      smem.full[warp_idx][stage_idx].wait(parity);\n      load_stage(stage_idx);\n",
        "gemm_sm90_w4_nvfp4_tiles.cu",
        "8",
        "in the call: seed",
    ),
    Mistake(
        "columns of x are overwritten that other warps still multiply",
        W4_TILES,
        "      smem.x_empty.wait((pass - 1) % 2);\n",
        "",
        "gemm_sm90_w4_nvfp4_tiles.cu",
        "8",
        "in the call: seed",
    ),
    Mistake(
        "all CTAs of a cluster are taken to have as many columns",
        W4_TILES,
        "all_columns % num_splits == 0;",
        "true;",
        "gemm_sm90_w4_nvfp4_tiles.cu",
        "8",
        "expected",
    ),
    Mistake(
        "scales of INT4 are those of the step before",
        W4_TILES,
        "        next.advance(share);\n        if (!next.is_over(share)) load_scales();",
        "        if (!next.is_over(share)) load_scales();\n        next.advance(share);",
        "gemm_sm90_w4_int4_tiles.cu",
        "8",
        "expected",
    ),
    Mistake(
        "a panel of x is released while a product reads it",
        W4_MANY,
        "if (step == 1 && !is_first) release_last();",
        "if (step == 0 && !is_first) release_last();",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1256",
        "expected",
    ),
    Mistake(
        "a panel of x is overwritten that the other CTA still reads",
        W4_MANY,
        "smem.empty[last_stage].arrive_at_cta(lane);",
        "smem.empty[last_stage].arrive_at_cta(rank);",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1256",
        "deadlock",
    ),
    Mistake(
        "the next tile begins with scales of this one",
        W4_MANY,
        "if (is_last) scales.begin(p, next.first_n",
        "if (is_last) scales.begin(p, tile.first_n",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1192",
        "expected",
    ),
    Mistake(
        "of those that have a part of a tile's K only the last but one is waited for",
        W4_MANY,
        "} while (GemmSm90Walk::run_begin(num_tiles * num_stages, other, num_clusters) > first_stage);",
        "} while (false);",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1128",
        "expected",
    ),
    Mistake(
        "half of the columns have the other half's scale",
        W4_TILED,
        "span = word * 16 / GROUP;",
        "span = product * 32 / GROUP;",
        "gemm_sm90_w4_nvfp4_fp8_many_rows.cu",
        "1192",
        "expected",
    ),
    Mistake(
        "a lane of fours takes x of the lower half of a tile's columns twice",
        W4_TILES,
        "load_shared_8_bytes(rows + j * 32)",
        "load_shared_8_bytes(rows + j % 2 * 32)",
        "gemm_sm90_w4_fours_tiles.cu",
        "8",
        "expected",
    ),
    Mistake(
        "a stage is released while a product reads its x",
        W4_SOME,
        "if (tile == 0 && i == 1 && step > begin) release_last();",
        "if (tile == 0 && i == 0 && step > begin) release_last();",
        "gemm_sm90_w4_nvfp4_some_rows.cu",
        "64",
        "expected",
    ),
    Mistake(
        "the other CTA's x is brought before this one has multiplied what lies there",
        W4_SOME,
        "smem.empty[last_stage].arrive_at_cta(split * SHARERS + lane);",
        "smem.empty[last_stage].arrive_at_cta(rank);",
        "gemm_sm90_w4_nvfp4_some_rows.cu",
        "64",
        "in the call: seed",
    ),
    Mistake(
        "scales are read as if chunks had not changed places",
        W4_SOME,
        "(place ^ row_tile % 8 * 16)",
        "place",
        "gemm_sm90_w4_mxfp4_some_rows.cu",
        "32",
        "expected",
    ),
    Mistake(
        "the other half's sums are added up",
        W4_SOME,
        "other * SHARERS + sharer)",
        "other * SHARERS)",
        "gemm_sm90_w4_int4_some_rows.cu",
        "48",
        "expected",
    ),
]
