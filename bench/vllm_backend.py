"""`python -m bench.vllm_backend [smollm2] [8b]`: vLLM 0.26 with its own FlashAttention-3 and with our plug-in, on one GPU.

smollm2: greedy text of a real model on real prompts, token by token; where two backends part, the two tokens must be as good
as equal by the logits of both (bench/harness/greedy.py). vLLM's own Triton backend is beside them: how often backends of vLLM
itself part. 8b: seconds of whole requests on random weights of the 8B class. Each engine is a process of its own. Writes
bench/results/vllm_backend.json and .md; exit status 1 if texts differ by more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.harness.greedy import NEAR_TIE, Text, complaint, partings

RESULTS = Path(__file__).resolve().parent / "results"
OURS, THEIRS, YARDSTICK = "CUSTOM", "FLASH_ATTN", "TRITON_ATTN"
NEW_TOKENS = 64
LENGTHS = (1, 3, 7, 15, 17, 31, 33, 63, 65, 127, 129, 257, 511, 513, 777, 1500) * 2
LOADS = {f"{n} x 512/128": [(512, 128)] * n for n in (1, 8, 32, 128)}
LOADS |= {"1 x 4096/128": [(4096, 128)], "16 x 4096/64": [(4096, 64)] * 16, "8 x 4096/1": [(4096, 1)] * 8}
SHAPE_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def engine(folder: str, backend: str, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enable_prefix_caching=False,
        disable_log_stats=True,
        attention_backend=backend,
        **options,
    )


def write_smollm2(folder: Path) -> None:
    """SmolLM2 in bf16 as vLLM reads it."""
    import torch
    from safetensors.torch import save_file

    from fastattn.compress.hf_folder import hf_config
    from fastattn.models.loader import open_model

    source, tensors = open_model("smollm2"), {}
    for name, info in source.tensors().items():
        tensors[name] = torch.empty(info.shape, dtype=torch.bfloat16)
        source.read(name, tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(source.config, torch.bfloat16)))


def prompts() -> list[list[int]]:
    import pydoc_data.topics

    from fastattn.models.loader import open_model

    tokenizer, rng = open_model("smollm2").tokenizer(), random.Random(0)
    tokens = tokenizer.encode("\n".join(pydoc_data.topics.topics.values()))
    starts = [rng.randrange(len(tokens) - length) for length in LENGTHS]
    return [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def greedy(folder: str, backend: str) -> list[Text]:
    from vllm import SamplingParams, TokensPrompt

    llm = engine(
        folder, backend, max_model_len=2048, gpu_memory_utilization=0.2, kv_cache_memory_bytes=4 << 30,
        logprobs_mode="raw_logits",
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=5)
    given = [TokensPrompt(prompt_token_ids=p) for p in prompts()]
    return [text_of(out.outputs[0]) for out in llm.generate(given, params, use_tqdm=False)]


def text_of(output: Any) -> Text:
    """Of one of vLLM's outputs, whose logprobs are logits."""
    rows = [sorted(((token, x.logprob) for token, x in row.items()), key=lambda r: -r[1]) for row in output.logprobs]
    return {"tokens": list(output.token_ids), "best": rows}


def times(folder: str, backend: str) -> dict[str, list[float]]:
    from vllm import SamplingParams, TokensPrompt

    llm = engine(folder, backend, load_format="dummy", max_model_len=8192, max_num_seqs=256, gpu_memory_utilization=0.8)
    rng = random.Random(0)

    def seconds(requests: list[tuple[int, int]]) -> float:
        batch = [TokensPrompt(prompt_token_ids=[rng.randint(10, 100000) for _ in range(n)]) for n, _ in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests
        ]
        start = time.perf_counter()
        llm.generate(batch, params, use_tqdm=False)
        return time.perf_counter() - start

    seconds([(64, 16)] * 8)
    return {name: [round(seconds(requests), 4) for _ in range(3)] for name, requests in LOADS.items()}


def compare(ours: list[Text], theirs: list[Text]) -> dict[str, Any]:
    found = partings(ours, theirs)
    return {"same": len(ours) - len(found), "of": len(ours), "steps_where_they_part": sorted(p.steps for p in found)}


def run_child(part: str, folder: str, backend: str) -> Any:
    """In a process of its own. Its log is shown where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out.json")
        command = [sys.executable, "-m", "bench.vllm_backend", "--child", part, folder, backend, str(out)]
        start = time.perf_counter()
        done = subprocess.run(command, env=os.environ | ENV, capture_output=True, text=True, check=False)
        print(f"{part} with {backend}: {time.perf_counter() - start:.0f} s", flush=True)
        log = done.stdout + done.stderr
        if done.returncode or not out.is_file():
            sys.exit(f"{part} with {backend} failed:\n{log[-3000:]}")
        if f"AttentionBackendEnum.{backend}" not in log:
            sys.exit(f"vLLM did not say that it uses {backend}:\n{log[-3000:]}")
        return json.loads(out.read_text())


def table(report: dict[str, Any]) -> str:
    meta = report["meta"]
    lines = [
        "# vllm_backend", "", f"{meta['gpu']}; {meta['date']}; commit {meta['commit']}; vLLM {report['vllm']}, torch {meta['torch']}.", "",
        f"Command: `{report['command']}`.", "",
    ]  # fmt: skip
    for name, found in report.get("smollm2", {}).items():
        lines += [
            f"SmolLM2, {found['of']} prompts, {NEW_TOKENS} greedy tokens each, {name}: {found['same']} texts are the same; where the "
            f"others part, the backends disagree on the two tokens by {found['steps_where_they_part']} steps of their logits in "
            f"bf16, of both backends together (a near tie: up to {NEAR_TIE:g}).",
            "",
        ]
    if loads := report.get("8b"):
        lines += [f"| 8B class, requests | {THEIRS} s | {OURS} s | ratio |", "| --- | --- | --- | --- |"]
        lines += [f"| {name} | {x['theirs']:.3f} | {x['ours']:.3f} | {x['ratio']:.3f} |" for name, x in loads.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.vllm_backend", description=__doc__)
    parser.add_argument("part", nargs="*", metavar="smollm2|8b")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument(
        "--add", action="store_true", help="keep the other part that DIR's file has, of the same GPU and commit"
    )
    parser.add_argument("--commit", metavar="SHA", help="what to record where there is no .git")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.part) - {"smollm2", "8b"}:
        parser.error(f"part is {unknown.pop()!r}, expected smollm2 or 8b")
    parts = args.part or ["smollm2", "8b"]
    if args.child:
        part, folder, backend, out = args.child
        Path(out).write_text(json.dumps((greedy if part == "smollm2" else times)(folder, backend)))
        os._exit(0)  # nothing of an engine's end is of interest

    import torch
    import vllm

    from bench.harness.environment import meta

    about = meta(torch.device("cuda"), "host clock, median of 3")
    report: dict[str, Any] = {
        "meta": about | ({"commit": args.commit} if args.commit else {}),
        "vllm": vllm.__version__,
    }
    wrong = None
    report["command"] = " ".join(["python -m bench.vllm_backend", *args.part])
    if args.add:
        kept = json.loads((args.out / "vllm_backend.json").read_text())
        if (kept["meta"]["gpu"], kept["meta"]["commit"]) != (report["meta"]["gpu"], report["meta"]["commit"]):
            sys.exit(f"--add: {args.out} has a file of {kept['meta']['gpu']}, commit {kept['meta']['commit']}")
        report["command"] = f"{kept['command']}; {report['command']} --add"
        report = kept | report
    args.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:  # after each part: an engine may fail in the next one
        (args.out / "vllm_backend.json").write_text(json.dumps(report, indent=2) + "\n")
        (args.out / "vllm_backend.md").write_text(table(report))

    with tempfile.TemporaryDirectory() as scratch:
        if "smollm2" in parts:
            write_smollm2(Path(scratch))
            backends = (THEIRS, OURS, YARDSTICK)  # at the same time: nothing is timed
            with ThreadPoolExecutor(len(backends)) as pool:
                found = pool.map(lambda backend: run_child("smollm2", scratch, backend), backends)
                texts = dict(zip(backends, found, strict=True))
            wrong = complaint(texts[OURS], texts[THEIRS], texts[YARDSTICK])
            report["smollm2"] = {f"{b} beside {THEIRS}": compare(texts[b], texts[THEIRS]) for b in (OURS, YARDSTICK)}
            save()
        if "8b" in parts:
            Path(scratch, "config.json").write_text(json.dumps(SHAPE_8B))
            theirs, ours = (run_child("8b", scratch, backend) for backend in (THEIRS, OURS))
            report["8b"] = {}
            for name in LOADS:
                a, b = statistics.median(theirs[name]), statistics.median(ours[name])
                report["8b"][name] = {
                    "theirs": a,
                    "ours": b,
                    "ratio": round(a / b, 3),
                    "all": [theirs[name], ours[name]],
                }
            save()
    print(table(report))
    if wrong:
        sys.exit(f"{OURS} beside {THEIRS}: {wrong}")


if __name__ == "__main__":
    main()
