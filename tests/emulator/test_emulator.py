"""The kernels' own CUDA sources, compiled for the CPU and run on drawn calls; and broken ones, which must be found out.

What the emulator is, and what it cannot see, is in device.h. By hand, after a run of this file with --basetemp=DIR:
`DIR/*/flash_fwd_sm90 0 1000`, with the seeds of the calls; a failing call is printed whole, and its seed runs it again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tools/build"))
from cuda_choice import nvcc_path  # noqa: E402

CSRC = ROOT / "csrc"
NUM_CALLS = int(os.environ.get("FASTATTN_EMULATOR_CALLS", "64"))  # of each kernel
NUM_CPUS = len(os.sched_getaffinity(0))

# Beside the first ones: many rows with one key, whose LSE is a score as wgmma adds it up, which 2e-4 did not allow.
FURTHER_CALLS = {"flash_fwd_sm90": 144}

KERNELS = {
    "flash_fwd_sm90": [*sorted(CSRC.glob("attention/flash_fwd_sm90*.cu")), CSRC / "attention/flash_combine.cu"],
    "flash_bwd_sm90": sorted(CSRC.glob("attention/flash_bwd_sm90*.cu")),
    "flash_sm80": [*sorted(CSRC.glob("attention/flash_sm80*.cu")), CSRC / "attention/flash_combine.cu"],
    "paged_decode": sorted(CSRC.glob("attention/paged_decode*.cu")),
    "gemm_sm90": [
        *sorted(
            {*CSRC.glob("gemm/gemm_*sm90*.cu")}
            - {*CSRC.glob("gemm/gemm_sm90_w4*.cu"), *CSRC.glob("gemm/gemm_sparse*.cu")}
        ),
        CSRC / "sampling/gumbel_max.cu",
    ],
    "gemm_sm90_sparse_24": sorted(CSRC.glob("gemm/gemm_sparse*_sm90.cu")),
    "gemm_sm90_w4_tiles": sorted(CSRC.glob("gemm/gemm_sm90_w4_*_tiles.cu")),
    "gemm_sm90_w4": [
        *sorted(CSRC.glob("gemm/gemm_sm90_w4*.cu")),
        *(CSRC / f"gemm/{name}.cu" for name in ("fp4_to_fp8", "w4_tiles")),
    ],
    "copy_blocks": [CSRC / "elementwise/copy_blocks.cu"],
    "small_operators": [
        *sorted(CSRC.glob("norm/*.cu")),
        *(CSRC / f"elementwise/{name}.cu" for name in ("embedding", "gated_activation")),
        *(CSRC / f"sampling/{name}.cu" for name in ("adjust_logits", "apply_token_bitmask")),
    ],
}
DEVICE = [HERE / f"{name}.cpp" for name in ("device", "copies", "tensor_cores", "runtime")]  # of every program


def cuda_include() -> Path | None:
    """Where the nvcc that a build would take has its headers; it may be a script that calls the real one."""
    if nvcc_path() is None:
        return None
    shown = subprocess.run([nvcc_path(), "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    found = re.search(r'INCLUDES="-I([^"]+)"', shown.stderr)
    return Path(found[1]) if found else None


CXX, INCLUDE = shutil.which("g++"), cuda_include()
pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no g++"),
    pytest.mark.skipif(INCLUDE is None, reason="no CUDA headers: nvcc is neither on the PATH nor in CUDA_HOME"),
]


# Compiling a kernel takes longer than its calls do, once what they spend their time in, DEVICE, is compiled for speed: with
# all vectors of this machine, and with no multiply-add that rounds once, so that every sum is the same as anywhere.
QUICKLY, FOR_SPEED = ["-Og"], ["-O3", "-march=native", "-ffp-contract=off"]


def compiler(flags: list[str], *first_include: Path) -> list[str]:
    """The command of a compilation, but for what is compiled."""
    includes = [f"-I{folder}" for folder in (*first_include, HERE, CSRC)]
    # Ubuntu's g++ has _FORTIFY_SOURCE on, to which a jump to another stack is an error.
    flags = ["-std=c++17", *flags, "-Wno-psabi", "-U_FORTIFY_SOURCE"]
    return [str(CXX), *flags, *includes, "-isystem", str(INCLUDE)]


class Build:
    """Objects and programs in a folder that the workers of a test run share: each is made once, by who needs it first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def objects(self, sources: Iterable[Path], *first_include: Path) -> list[Path]:
        with ThreadPoolExecutor(NUM_CPUS) as pool:
            return list(pool.map(lambda source: self._object(source, first_include), sources))

    def _object(self, source: Path, first_include: tuple[Path, ...]) -> Path:
        target = (first_include[0] if first_include else self.folder) / f"{source.name}.o"
        if source in DEVICE:
            return self._make(target, [*compiler(FOR_SPEED), "-include", str(HERE / "device.h"), "-c", str(source)])
        command = [*compiler(QUICKLY, *first_include), "-include", str(self._prefix()), "-Winvalid-pch"]
        return self._make(target, [*command, "-x", "c++", "-c", str(source)])

    def _prefix(self) -> Path:
        """A header that includes device.h, compiled: reading it and CUDA's is half of what compiling a kernel takes."""
        prefix = self.folder / "prefix.h"
        self._make(Path(f"{prefix}.gch"), [*compiler(QUICKLY), "-x", "c++-header", str(HERE / "device.h")])
        return prefix

    def program(self, name: str, objects: Iterable[Path]) -> Path:
        return self._make(self.folder / name, [CXX, *map(str, objects)])

    def _make(self, target: Path, command: list[str]) -> Path:
        with Path(f"{target}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                done = subprocess.run([*command, "-o", f"{target}.new"], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                Path(f"{target}.new").rename(target)
        return target


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"
    folder.mkdir(exist_ok=True)
    return Build(folder)


def sources(kernel: str) -> list[Path]:
    return [*KERNELS[kernel], HERE / f"{kernel}.cpp", *DEVICE]


def run(program: Path, first: int, last: int, *size: str) -> str:
    """What the program has to say of these calls, empty if all were right."""
    done = subprocess.run([program, str(first), str(last), *size], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr or f"{program.name} ended with {done.returncode}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_drawn_calls(build: Build, kernel: str) -> None:
    program = build.program(kernel, build.objects(sources(kernel)))
    parts = 4 * NUM_CPUS
    edges = [NUM_CALLS * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(NUM_CPUS) as pool:
        reports = list(pool.map(lambda part: run(program, edges[part], edges[part + 1]), range(parts)))
    if kernel in FURTHER_CALLS:
        reports.append(run(program, FURTHER_CALLS[kernel], FURTHER_CALLS[kernel] + 1))
    assert not any(reports), "\n".join(filter(None, reports))


@dataclass(frozen=True)
class Mutant:
    """A kernel with one mistake, in one of its headers."""

    mistake: str
    header: str
    before: str
    after: str
    unit: str  # that is compiled with it
    size: str  # of the calls: a head dim, or rows of a tile, or 1 for those with turns, 2 with stream-K, 3 in order
    finds: str  # what the report says, at least


FWD, BWD = "attention/flash_fwd_sm90.cuh", "attention/flash_bwd_sm90.cuh"
FWD_8BIT, SM80 = "attention/flash_fwd_sm90_8bit.cuh", "attention/flash_sm80.cuh"
DECODE, MASK = "attention/paged_decode.cuh", "attention/mask.cuh"
DECODE_CLUSTER = "attention/paged_decode_cluster.cuh"
GEMM, FEW_ROWS = "gemm/gemm_sm90.cuh", "gemm/gemm_sm90_few_rows.cuh"
GEMM_TILES, GEMM_OPERANDS = "gemm/gemm_sm90_tiles.cuh", "gemm/gemm_sm90_operands.cuh"
GEMM_SCALES = "gemm/gemm_sm90_block_scales.cuh"
GEMM_NORM, GEMM_SUMS = "gemm/gemm_sm90_norm.cuh", "gemm/gemm_sm90_sums.cuh"
W4, W4_FORMATS = "gemm/gemm_sm90_w4.cuh", "gemm/gemm_sm90_w4_formats.cuh"
W4_PRODUCTS = "gemm/gemm_sm90_w4_products.cuh"
W4_TILES, W4_TILES_FORMATS = "gemm/gemm_sm90_w4_tiles.cuh", "gemm/gemm_sm90_w4_tiles_formats.cuh"
W4_MANY, W4_TILED = "gemm/gemm_sm90_w4_many_rows.cuh", "gemm/gemm_sm90_w4_tiled_operands.cuh"
ROW_CACHE, REDUCE = "norm/row_cache.cuh", "arch/reduce.cuh"
GEMM_STORES, GEMM_ADDED = "gemm/gemm_sm90_stores.cuh", "gemm/gemm_sm90_added_rows.cuh"
SPARSE, TRANSPOSED = "gemm/gemm_sm90_sparse_24.cuh", "gemm/gemm_sm90_transposed_rows.cuh"
KERNEL_OF = {header: Path(header).stem for header in (FWD, BWD, DECODE, GEMM, W4, SM80, SPARSE)}
KERNEL_OF |= {FWD_8BIT: "flash_fwd_sm90", FEW_ROWS: "gemm_sm90", W4_FORMATS: "gemm_sm90_w4", MASK: "paged_decode"}
KERNEL_OF |= {DECODE_CLUSTER: "paged_decode"}
KERNEL_OF |= {GEMM_TILES: "gemm_sm90", GEMM_OPERANDS: "gemm_sm90", GEMM_NORM: "gemm_sm90", GEMM_SUMS: "gemm_sm90"}
KERNEL_OF |= {GEMM_STORES: "gemm_sm90", GEMM_ADDED: "gemm_sm90", GEMM_SCALES: "gemm_sm90"}
KERNEL_OF |= {ROW_CACHE: "small_operators", REDUCE: "small_operators"}
KERNEL_OF |= {W4_MANY: "gemm_sm90_w4", W4_TILED: "gemm_sm90_w4", W4_PRODUCTS: "gemm_sm90_w4"}
KERNEL_OF |= {TRANSPOSED: "gemm_sm90_sparse_24"}
KERNEL_OF |= {W4_TILES: "gemm_sm90_w4_tiles", W4_TILES_FORMATS: "gemm_sm90_w4_tiles"}
MUTANTS = [
    Mutant(
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
    Mutant(
        "V is released before the product that reads it is over",
        FWD,
        """      start_first_scores();
      wgmma_wait<1>();
      pin_registers(acc);
      pin_registers(probs);
      release_v();""",
        """      release_v();
      start_first_scores();
      wgmma_wait<1>();
      pin_registers(acc);
      pin_registers(probs);""",
        "flash_fwd_sm90_hd128.cu",
        "128",
        "expected",
    ),
    Mutant(
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
    # Undefined, and every test passed on GPUs; synccheck found it.
    Mutant(
        "each warp decides for itself whether it waits for products",
        FWD,
        "if (any_of_group(kVoteOfGroup + consumer, moved | (parts[0]",
        "if ((moved | (parts[0]",
        "flash_fwd_sm90_fp8_hd128.cu",
        "128",
        "wait for products at different places",
    ),
    Mutant(
        "negative scores of fp8 are compared as integers",
        FWD,
        "if (__any_sync(0xffffffffu, signs < 0)) {",
        "if (__any_sync(0xffffffffu, false)) {",
        "flash_fwd_sm90_fp8_hd128.cu",
        "128",
        "expected",
    ),
    # Wrong rows, or an end that never comes: who is first, the schedule decides.
    Mutant(
        "a block is widened over one that a product still reads",
        FWD,
        "        empty.wait(parity ^ 1);\n",
        "",
        "flash_fwd_sm90_8bit_hd128.cu",
        "128",
        "in the call: seed",
    ),
    Mutant(
        "P is multiplied by the factors of another block",
        FWD,
        "slot_of(k_ring.count - 1)",
        "slot_of(k_ring.count)",
        "flash_fwd_sm90_8bit_hd128.cu",
        "128",
        "expected",
    ),
    Mutant(
        "O is not brought to the larger factors of a block",
        FWD,
        "for (float& x : acc[t]) x *= ratio;",
        "for (float& x : acc[t]) x *= 1.0f;",
        "flash_fwd_sm90_8bit_hd128.cu",
        "128",
        "expected",
    ),
    Mutant(
        "Q is released before the product that reads it is over",
        BWD,
        """      wgmma_wait<1>();
      release(smem.q_empty[(q_ring.count - 1) % Storage::kStagesQ]);""",
        """      release(smem.q_empty[(q_ring.count - 1) % Storage::kStagesQ]);
      wgmma_wait<1>();""",
        "flash_bwd_sm90_hd128.cu",
        "128",
        "expected",
    ),
    # A form of the kernel had this, and every test passed on GPUs.
    Mutant(
        "a warp writes dS while a product of its own group reads it",
        BWD,
        "      release(smem.probs_full);  // this",
        "      for (int i = 0; i < 4 && warp_idx % 4 == 0; ++i) release(smem.probs_full);  // this",
        "flash_bwd_sm90_hd256.cu",
        "256",
        "expected",
    ),
    Mutant(
        "a group writes dS while the other one's product reads it",
        BWD,
        "    smem.ds_empty[ds_stage].wait(ds_ring.parity() ^ 1);\n",
        "",
        "flash_bwd_sm90_hd128.cu",
        "128",
        "expected",
    ),
    Mutant(
        "a split goes on with the sums of the one before",
        DECODE,
        "    if constexpr (INVARIANT) products.begin(p);\n  }\n",
        "  }\n",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mutant(
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
    ),
    Mutant(
        "a copy is not waited for",
        DECODE,
        "cp_async_wait<STAGES - 2>();",
        "cp_async_wait<STAGES - 1>();",
        "paged_decode_hd64.cu",
        "64",
        "ended before its copies did",
    ),
    Mutant(
        "stages are loaded while other warps read results from them",
        DECODE,
        "    team.sync();  // the stages are free again\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mutant(
        "a row of Q that another warp loads is not waited for",
        DECODE_CLUSTER,
        "      __syncthreads();  // Q has come\n",
        "",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mutant(
        "values are loaded while other warps still multiply by those before",
        SM80,
        "    __syncthreads();\n    load_kv(kv.v, ",
        "    load_kv(kv.v, ",
        "flash_sm80_hd64.cu",
        "64",
        "expected",
    ),
    Mutant(
        "keys of a tree are taken for ones that all of its tokens see",
        MASK,
        "range.end = k_len - q_len;",
        "range.end = k_len;",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mutant(
        "a window over a tree begins where it would over a chain",
        MASK,
        "words == nullptr ? first : 0",
        "first",
        "paged_decode_hd64.cu",
        "64",
        "expected",
    ),
    Mutant(
        "a stage is free when one of the two CTAs is done with it",
        GEMM,
        "smem.empty[i].init(NUM_CTAS * NUM_WARPS / HALVES);",
        "smem.empty[i].init(NUM_WARPS / HALVES);",
        "gemm_sm90_many_rows.cu",
        "128",
        "deadlock",
    ),
    Mutant(
        "the CTA that loads the other half of the weight is not told that a stage is free",
        GEMM,
        "if (lane < NUM_CTAS) smem.empty[stage].arrive_at_cta(lane);",
        "if (lane < NUM_CTAS) smem.empty[stage].arrive();",
        "gemm_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "a CTA stores rows that are the next one's, of which it has loaded nothing",
        GEMM,
        "min(tile.first_m + cta_rows, num_rows)",
        "num_rows",
        "gemm_sm90_many_rows.cu",
        "192",
        "expected",
    ),
    Mutant(
        "a run that begins inside a tile loads the tile's first columns",
        GEMM,
        "for (int32_t step = walk.begin(part); step < walk.end(part); ++step) {",
        "for (int32_t step = 0; step < walk.end(part) - walk.begin(part); ++step) {",
        "gemm_sm90_many_rows.cu",
        "2",
        "expected",
    ),
    Mutant(
        "squares of the columns that other CTAs have are left out",
        GEMM,
        "if constexpr (kCounts) moments.add_from(handed, BLOCK_N / 8);",
        "",
        "gemm_rms_norm_sm90_many_rows.cu",
        "2",
        "expected",
    ),
    # The launch failed on a GPU: a barrier that is two phases behind looks like one whose phase is over.
    Mutant(
        "a group looks for its stages before its turn",
        GEMM,
        "        if constexpr (OWN_TILES) turns.take();\n",
        "",
        "gemm_sm90_many_rows.cu",
        "1",
        "in the call: seed",
    ),
    Mutant(
        "a group goes on in the stages of the other's tile",
        GEMM,
        "        if constexpr (OWN_TILES) position.count += num_steps;  // the other's\n",
        "",
        "gemm_sm90_many_rows.cu",
        "1",
        "in the call: seed",
    ),
    Mutant(
        "sums are written where the other group still reads operands",
        FEW_ROWS,
        "    named_barrier_sync(1, 128 * GROUPS);  // all groups are done with the ring\n",
        "",
        "gemm_sm90_few_rows.cu",
        "64",
        "expected",
    ),
    Mutant(
        "one group of 64 rows leaves every other panel to another",
        GEMM_TILES,
        "static constexpr int kPanelsApart = 64 * GROUPS / A_ROWS;",
        "static constexpr int kPanelsApart = A_ROWS == 64 ? 2 : 1;",
        "gemm_sm90_in_order.cu",
        "3",
        "expected",
    ),
    Mutant(
        "a CTA ends while others read its sums",
        FEW_ROWS,
        "  cluster_meet();  // the others may still read from this CTA\n",
        "",
        "gemm_sm90_few_rows.cu",
        "8",
        "CTA that has ended",
    ),
    Mutant(
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
    Mutant(
        "a stage is released while a product reads x there",
        W4,
        "if (i == 1 && position.count > 0",
        "if (i == 0 && position.count > 0",
        "gemm_sm90_w4_nvfp4.cu",
        "64",
        "expected",
    ),
    Mutant(
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
    Mutant(
        "a warp's stage is loaded again before it is multiplied",
        W4_TILES,
        "      smem.full[warp_idx][stage_idx].wait(parity);\n",
        "      smem.full[warp_idx][stage_idx].wait(parity);\n      load_stage(stage_idx);\n",
        "gemm_sm90_w4_nvfp4_tiles.cu",
        "16",
        "in the call: seed",
    ),
    Mutant(
        "columns of x are overwritten that other warps still multiply",
        W4_TILES,
        "      smem.x_empty.wait((pass - 1) % 2);\n",
        "",
        "gemm_sm90_w4_nvfp4_tiles.cu",
        "16",
        "in the call: seed",
    ),
    Mutant(
        "all CTAs of a cluster are taken to have as many columns",
        W4_TILES,
        "all_columns % num_splits == 0;",
        "true;",
        "gemm_sm90_w4_nvfp4_tiles.cu",
        "8",
        "expected",
    ),
    Mutant(
        "scales of INT4 are those of the step before",
        W4_TILES,
        "        next.advance(share);\n        if (!next.is_over(share)) load_scales();",
        "        if (!next.is_over(share)) load_scales();\n        next.advance(share);",
        "gemm_sm90_w4_int4_tiles.cu",
        "8",
        "expected",
    ),
    Mutant(
        "a panel of x is released while a product reads it",
        W4_MANY,
        "if (step == 1 && !is_first) release_last();",
        "if (step == 0 && !is_first) release_last();",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1256",
        "expected",
    ),
    Mutant(
        "a panel of x is overwritten that the other CTA still reads",
        W4_MANY,
        "smem.empty[last_stage].arrive_at_cta(lane);",
        "smem.empty[last_stage].arrive_at_cta(rank);",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1256",
        "deadlock",
    ),
    Mutant(
        "the next tile begins with scales of this one",
        W4_MANY,
        "if (is_last) scales.begin(p, next.first_n",
        "if (is_last) scales.begin(p, tile.first_n",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1192",
        "expected",
    ),
    Mutant(
        "of those that have a part of a tile's K only the last but one is waited for",
        W4_MANY,
        "} while (GemmSm90Walk::run_begin(num_tiles * num_stages, other, num_clusters) > first_stage);",
        "} while (false);",
        "gemm_sm90_w4_nvfp4_many_rows.cu",
        "1128",
        "expected",
    ),
    Mutant(
        "rows of out are written over before they have left",
        TRANSPOSED,
        "      named_barrier_sync(barrier, 128);  // what was staged has been read\n",
        "",
        "gemm_sparse_sm90.cu",
        "256",
        "expected",
    ),
    Mutant(
        "half of the columns have the other half's scale",
        W4_TILED,
        "span = word * 16 / GROUP;",
        "span = product * 32 / GROUP;",
        "gemm_sm90_w4_nvfp4_fp8_many_rows.cu",
        "1192",
        "expected",
    ),
    Mutant(
        "the tensor cores add up all of K in fp8",
        GEMM_OPERANDS,
        "kTwoLevels = !FAST_ACCUM;",
        "kTwoLevels = false;",
        "gemm_fp8_sm90_few_rows.cu",
        "8",
        "expected",
    ),
    Mutant(
        "a stage is released before the second half of a tile has been multiplied",
        GEMM_TILES,
        "if (panel + Descriptors::kPanelsApart >= Ring::kPanels && row + PART_ROWS == B_ROWS) release(stage);",
        "if (panel + Descriptors::kPanelsApart >= Ring::kPanels && row == 0) release(stage);",
        "gemm_fp8_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "sums of a panel are multiplied by the scales of the one before",
        GEMM_SCALES,
        """    now_ = fetch();
    panels_.advance();""",
        "    now_ = fetch();",
        "gemm_fp8_blocks_sm90.cu",
        "128",
        "expected",
    ),
    Mutant(
        "panels of the second group have the scales of the first one's",
        FEW_ROWS,
        "const int32_t first_panel = begin_step * Ring::kPanels + (kApart == 2 ? group : 0);",
        "const int32_t first_panel = begin_step * Ring::kPanels;",
        "gemm_fp8_blocks_sm90.cu",
        "8",
        "expected",
    ),
    Mutant(
        "the squares of half of the columns are left out",
        FEW_ROWS,
        "const int part = PARTS == 2 ? group : 0;",
        "const int part = 0;",
        "gemm_rms_norm_sm90_few_rows.cu",
        "8",
        "expected",
    ),
    Mutant(
        "zeros behind the end of a row are counted as its elements",
        GEMM_NORM,
        "(lane % 4 * 2 + chunk) * 8 < columns_left ? first[i] : 0.0f;",
        "first[i];",
        "gemm_layer_norm_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "a variance is the difference of two large numbers",
        GEMM_NORM,
        "return row < p.m ? to_float(static_cast<const T*>(p.x)[row * p.x_stride]) : 0.0f;",
        "return 0.0f;",
        "gemm_layer_norm_sm90_many_rows.cu",
        "192",
        "expected",
    ),
    Mutant(
        "columns of out take the place of those eight before",
        GEMM_TILES,
        "w[out_t % 4 + i / PER_COLUMN]",
        "w[i / PER_COLUMN]",
        "gemm_gated_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "sums of ups lie where those of the next gates do",
        GEMM_SUMS,
        "PER_COLUMN == 1 ? 8 : kOutColumns;",
        "8;",
        "gemm_gated_sm90_few_rows.cu",
        "8",
        "expected",
    ),
    Mutant(
        "rows eight apart have one zero point",
        GEMM_TILES,
        "of_row.zero_point[j / 2]",
        "of_row.zero_point[0]",
        "gemm_int8_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "all rows that a lane adds up have the zero point of the first one",
        FEW_ROWS,
        "        if (sum_row != row) row_zero_point = zero_point_of(p, first_m + sum_row);\n",
        "",
        "gemm_int8_sm90_few_rows.cu",
        "64",
        "expected",
    ),
    Mutant(
        "all rows that a lane adds a residual to get the first one's",
        FEW_ROWS,
        "        if (is_there && sum_row != row) of_row.load(p, first_m + sum_row, column);\n",
        "",
        "gemm_added_sm90_few_rows.cu",
        "64",
        "expected",
    ),
    Mutant(
        "a residual's columns stay with the lane that asked for them",
        GEMM_ADDED,
        "      gather_columns(words, lane);  // which undoes itself\n",
        "",
        "gemm_added_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "a row's squares are those of half of its lanes",
        GEMM_ADDED,
        "    sum += __shfl_xor_sync(0xffffffffu, sum, 2);\n",
        "",
        "gemm_added_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "the last of the given squares are asked for, but not added",
        GEMM_NORM,
        "while (first < num_parts + 4) step(p, row, lane);",
        "",
        "gemm_rms_norm_given_sm90_many_rows.cu",
        "128",
        "expected",
    ),
    Mutant(
        "every CTA of a cluster adds up all of the given squares",
        FEW_ROWS,
        "rank * PARTS + part, num_splits * PARTS",
        "0, 1",
        "gemm_rms_norm_sm90_few_rows.cu",
        "8",
        "expected",
    ),
    Mutant(
        "half of a tile's tokens are not looked at",
        GEMM_STORES,
        "distance = LANES / 2;",
        "distance = LANES / 4;",
        "gemm_sampled_sm90_few_rows.cu",
        "8",
        "expected",
    ),
    Mutant(
        "every other product has the metadata of the one before",
        SPARSE,
        "Product::template ss<kSharesWord>(",
        "Product::template ss<0>(",
        "gemm_sparse_sm90.cu",
        "16",
        "expected",
    ),
    # Results differed from run to run on an H200; no document says how long a product reads its metadata.
    Mutant(
        "a register is overwritten from which a product still reads metadata",
        SPARSE,
        "      const Products products(smem, stage, group, metadata[i]);\n",
        "      const Products products(smem, stage, group, metadata[i]);\n      metadata[1 - i][0] = 0x44444444;\n",
        "gemm_sparse_sm90.cu",
        "256",
        "expected",
    ),
    Mutant(
        "sums of the CTA that has a tile's first columns are left out",
        SPARSE,
        "for (int32_t other = cluster - 1; other >= first; --other) {",
        "for (int32_t other = cluster - 1; other > first; --other) {",
        "gemm_sparse_sm90.cu",
        "64",
        "expected",
    ),
    Mutant(
        "vectors behind those in registers are passed over",
        ROW_CACHE,
        "for (Index vec_idx = kCached * blockDim.x + threadIdx.x;",
        "for (Index vec_idx = (kCached + 1) * blockDim.x + threadIdx.x;",
        "rms_norm.cu",
        "1",
        "expected",
    ),
    Mutant(
        "a sum is read before all warps have added to it",
        REDUCE,
        """  __syncthreads();
  // Every warp""",
        "  // Every warp",
        "layer_norm.cu",
        "2",
        "expected",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.mistake.replace(" ", "-"))
def test_a_mistake_is_found(build: Build, tmp_path: Path, mutant: Mutant) -> None:
    kernel = KERNEL_OF[mutant.header]
    text = (CSRC / mutant.header).read_text()
    assert text.count(mutant.before) == 1
    header = tmp_path / mutant.header
    header.parent.mkdir()
    header.write_text(text.replace(mutant.before, mutant.after))
    unit = next(source for source in sources(kernel) if source.name == mutant.unit)
    objects = build.objects([unit], tmp_path)
    objects += build.objects(source for source in sources(kernel) if source != unit)
    program = Build(tmp_path).program(kernel, objects)
    assert mutant.finds in run(program, 0, 300, mutant.size)
