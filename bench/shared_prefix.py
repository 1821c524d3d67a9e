"""`python -m bench.shared_prefix`: requests of an 8B shape that begin alike (a system prompt, a document), with cascade attention
and with `--disable-cascade-attn`, in one process after the other on one GPU. Writes bench/results/shared_prefix.json and .md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# requests, tokens that they share, tokens of each one's own, new tokens
LOADS = ((16, 8192, 64, 128), (64, 2048, 64, 128), (64, 8192, 64, 128), (256, 2048, 64, 128))
ROUNDS = 2


def measure(disable: bool, kv_cache_dtype: str) -> list[list[float]]:
    """Seconds of each load's rounds; the prefix is in the cache before."""
    import fastattn
    from bench.random_model import LLAMA_8B, RandomSource
    from fastattn.models.config import config_from_hf

    llm = fastattn.LLM(
        RandomSource(config_from_hf(LLAMA_8B | {"max_position_embeddings": 16384})),
        device="cuda", dtype="bfloat16", max_model_len=8704, max_num_seqs=256, gpu_memory_utilization=0.85, quiet=True,
        kv_cache_dtype=kv_cache_dtype, disable_cascade_attn=disable,
    )  # fmt: skip
    rng, found = random.Random(0), []
    for count, shared, own, new in LOADS:
        start = [rng.randint(10, 100_000) for _ in range(shared)]
        params = fastattn.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)

        def prompts(num: int, start: list[int] = start, own: int = own) -> list[Any]:
            return [{"prompt_token_ids": start + [rng.randint(10, 100_000) for _ in range(own)]} for _ in range(num)]

        llm.generate(prompts(1), params, use_tqdm=False)
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            llm.generate(prompts(count), params, use_tqdm=False)
            seconds.append(time.perf_counter() - began)
        found.append([round(s, 4) for s in seconds[1:]])  # the first one records graphs
    return found


def table(report: dict[str, Any]) -> str:
    meta = report["meta"]
    lines = [
        "# shared_prefix", "", f"{meta['gpu']}; {meta['date']}; commit {meta['commit']}; torch {meta['torch']}.", "",
        f"Command: `python -m bench.shared_prefix`. Method: {meta['method']}.", "",
        "| KV cache | requests, shared, own, new tokens | each for itself, s | cascade, s | ratio |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in report["loads"]:
        load = ", ".join(f"{n:,}" for n in row["load"])
        lines.append(f"| {row['kv']} | {load} | {row['apart']:.3f} | {row['cascade']:.3f} | {row['ratio']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.shared_prefix", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--commit", metavar="SHA", help="what to record where there is no .git")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0] == "apart", args.child[1])))
        return

    import torch

    from bench.harness.environment import meta

    about = meta(
        torch.device("cuda"), f"host clock, from the prompts going in until the last token, median of {ROUNDS}"
    )
    report: dict[str, Any] = {"meta": about | ({"commit": args.commit} if args.commit else {}), "loads": []}
    for kv in ("auto", "fp8"):
        times = {}
        for how in ("apart", "cascade"):
            command = [sys.executable, "-m", "bench.shared_prefix", "--child", how, kv]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{kv}, {how}:\n{(done.stdout + done.stderr)[-3000:]}")
            times[how] = json.loads(done.stdout.splitlines()[-1])
        for load, apart, cascade in zip(LOADS, times["apart"], times["cascade"], strict=True):
            a, b = statistics.median(apart), statistics.median(cascade)
            row = {
                "kv": "bf16" if kv == "auto" else kv,
                "load": load,
                "apart": a,
                "cascade": b,
                "ratio": round(a / b, 3),
            }
            report["loads"].append(row | {"all": [apart, cascade]})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "shared_prefix.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "shared_prefix.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
