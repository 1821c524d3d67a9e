"""`python -m bench.product`: the product as a user runs it, with SmolLM2: speculation, each cheaper form, the server.

Everything goes through the commands (`fastattn quantize`, `eval`, `serve`, `bench serve`) or `LLM`, each in a process of its
own. Writes bench/results/product_<device>.json and .md. It checks what can be checked (speculative greedy text, answers of
the server, streams that outlive a killed engine) and times the rest; nothing here is a ratio to a peer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MODEL = "smollm2"
FORMS = ("int8", "int4", "nvfp4", "mxfp4")
SPECULATION: dict[str, dict[str, Any]] = {
    "none": {},
    "ngram": {"method": "ngram", "num_speculative_tokens": 4},
    # The model as its own draft: nearly every guess is right, so this is the machinery's cost, not a gain.
    "draft_self": {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 4},
}
_ENGINE = {"max_model_len": 2048, "num_kv_blocks": 16384, "quiet": True}


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.product", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="short texts and few requests")
    parser.add_argument("--commit", metavar="SHA", help="what to record where there is no .git")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_CHILDREN[args.child[0]](args.device, args.quick, *args.child[1:])))
        return 0

    import torch

    from bench.harness.environment import meta

    about = meta(torch.device(args.device), "wall clock, second run of each; each part in a process of its own")
    report: dict[str, Any] = {"meta": about | ({"commit": args.commit} if args.commit else {})}
    report["command"] = " ".join(["python -m bench.product", *sys.argv[1:]])
    failures: list[str] = []

    def part(name: str, *child: str) -> None:
        started = time.perf_counter()
        try:
            report[name] = _child(args, *child)
            print(f"{name}: {json.dumps(report[name])} ({time.perf_counter() - started:.0f} s)", flush=True)
        except Exception as error:
            failures.append(f"{name}: {error}")
            print(f"{name}: FAILED: {error}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        for name in SPECULATION:
            part(f"speculation {name}", "speculation", name)
        part("form bf16" if args.device == "cuda" else "form fp32", "form", MODEL)
        for form in FORMS:
            folder = str(Path(scratch, form))
            part(f"quantize {form}", "quantize", form, folder)
            if Path(folder).exists():
                part(f"form {form}", "form", folder)
        part("server", "server", MODEL)
        part("server, engine killed", "killed", MODEL)
        if Path(scratch, "int8").exists():
            part("server int8", "server", str(Path(scratch, "int8")))
    texts = [report.get(f"speculation {name}", {}).pop("token_ids", None) for name in SPECULATION]
    for name, ids in zip(SPECULATION, texts, strict=True):
        if ids and texts[0]:
            same = sum(a == b for a, b in zip(ids, texts[0], strict=True))
            report[f"speculation {name}"]["texts_equal_to_none"] = f"{same}/{len(ids)}"
    report["failures"] = failures
    _write(report, args)
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def _child(args: argparse.Namespace, *words: str) -> Any:
    command = [sys.executable, "-m", "bench.product", "--device", args.device, *["--quick"] * args.quick]
    done = subprocess.run([*command, "--child", *words], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- parts: each runs in a process of its own ----


def _requests(tokenizer: Any, count: int, prompt: int) -> list[dict[str, list[int]]]:
    from bench.families.smollm2 import TEXT

    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    ring = ids * (2 + prompt // len(ids))
    return [{"prompt_token_ids": ring[(17 * i) % len(ids) :][:prompt]} for i in range(count)]


def _speed(llm: Any, count: int, prompt: int, new: int) -> tuple[float, list[list[int]]]:
    """Tokens a second, the second time: graphs are captured and caches warm then."""
    from fastattn import SamplingParams

    prompts = _requests(llm.tokenizer, count, prompt)
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    return sum(map(len, ids)) / seconds, ids


def speculation(device: str, quick: bool, name: str) -> dict[str, Any]:
    from fastattn import LLM
    from fastattn.speculative.config import SpeculativeConfig

    given = SPECULATION[name]
    options = {"speculative": SpeculativeConfig(**given)} if given else {}
    llm = LLM(MODEL, device=device, enable_prefix_caching=False, **options, **_ENGINE)
    new = 32 if quick else 192
    alone, ids = _speed(llm, 1, 256, new)
    many, more = _speed(llm, 4 if quick else 32, 256, new)
    stats = llm.engine.stats()
    return {
        "tokens_per_s_1": alone,
        "tokens_per_s_32": many,
        "draft_tokens": stats.num_draft_tokens,
        "accepted_tokens": stats.num_accepted_tokens,
        "token_ids": ids + more,
    }


def form(device: str, quick: bool, model: str) -> dict[str, Any]:
    from fastattn import LLM

    llm = LLM(model, device=device, enable_prefix_caching=False, **_ENGINE)
    new = 16 if quick else 128
    alone, _ = _speed(llm, 1, 128, new)
    many, _ = _speed(llm, 4 if quick else 64, 128, new)
    weights = sum(p.numel() * p.element_size() for p in llm.engine.runner.model.parameters())
    del llm
    result: dict[str, Any] = {"tokens_per_s_1": alone, "tokens_per_s_64": many, "weight_bytes": weights}
    if model != MODEL:
        words = ["eval", model, "--against", MODEL, "--device", device, "--json", "-q"]
        result["eval"] = json.loads(_fastattn(*words, *["--max-tokens", "1024"] * quick))
    return result


def quantize(device: str, quick: bool, scheme: str, out: str) -> dict[str, Any]:
    start = time.perf_counter()
    _fastattn("quantize", MODEL, out, "--scheme", scheme, "--device", device, "-q", *["--samples", "8"] * quick)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    return {"seconds": time.perf_counter() - start, "file_bytes": size}


def server(device: str, quick: bool, model: str) -> dict[str, Any]:
    count = 16 if quick else 256
    started = time.perf_counter()
    with _serve(device, model) as url, tempfile.TemporaryDirectory() as folder:
        seconds = time.perf_counter() - started
        _fastattn(
            "bench", "serve", "--base-url", url, "--tokenizer", MODEL, "--num-prompts", str(count), "--input-len", "128",
            "--output-len", "128", "--max-concurrency", str(min(count, 64)), "--ignore-eos", "--save-result",
            "--result-dir", folder, "--result-filename", "r.json", "--disable-tqdm",
        )  # fmt: skip
        found = json.loads(Path(folder, "r.json").read_text())
        answer = _ask(url, "What is the capital of France?")
    keys = (
        "completed", "request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_itl_ms", "p99_itl_ms",
    )  # fmt: skip
    return {"start_to_ready_s": seconds, "answer": answer} | {key: found[key] for key in keys if key in found}


def killed(device: str, quick: bool, model: str) -> dict[str, Any]:
    """kill -9 of the engine under 8 streams; each must end as it does undisturbed."""
    prompts = [f"Write a story about the number {i}." for i in range(8)]
    tokens = 64 if quick else 400
    with _serve(device, model) as url, ThreadPoolExecutor(8) as pool:
        calm = list(pool.map(lambda p: _ask(url, p, tokens), prompts))
        again = list(pool.map(lambda p: _ask(url, p, tokens), prompts))
        streams = [pool.submit(_ask, url, p, tokens) for p in prompts]
        time.sleep(0.4)
        engines = _engines()
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        start = time.perf_counter()
        disturbed = [stream.result(timeout=120) for stream in streams]
        seconds = time.perf_counter() - start
    return {
        "engines_killed": len(engines),
        "streams_ended": len(disturbed),
        "equal": sum(a == b for a, b in zip(calm, disturbed, strict=True)),
        "equal_undisturbed": sum(a == b for a, b in zip(calm, again, strict=True)),
        "seconds_to_the_last_end": seconds,
    }


_CHILDREN = {"speculation": speculation, "form": form, "quantize": quantize, "server": server, "killed": killed}


# ---- processes ----


def _fastattn(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", *words], capture_output=True, text=True, timeout=550, check=False
    )
    if done.returncode:
        raise RuntimeError(f"fastattn {' '.join(words[:2])}: {done.stderr.strip()[-800:]}")
    return done.stdout


@contextmanager
def _serve(device: str, model: str) -> Iterator[str]:
    command = [sys.executable, "-m", "fastattn", "serve", model, "--device", device, "--port", "0"]
    command += ["--max-model-len", "2048", "--num-kv-blocks", "16384", "--served-model-name", "m"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{_port(process, log)}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError("the server did not end within 40 s of SIGTERM") from None


def _port(process: subprocess.Popen[bytes], log: Any) -> int:
    """Waits for the ready line."""
    for _ in range(1200):
        log.seek(0)
        for line in log.read().splitlines():
            if "ready, " in line:
                return int(line.split("http://127.0.0.1:")[1].split()[0].strip("/"))
        if process.poll() is not None:
            break
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"the server is not ready: {log.read()[-800:]}")


def _ask(url: str, prompt: str, max_tokens: int = 32) -> str:
    body = {
        "model": "m", "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": max_tokens,
        "stream": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text = ""
    with urllib.request.urlopen(request, timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event))
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return text


def _engines() -> list[int]:
    """The engine processes of the server that this process started."""
    import psutil

    servers = psutil.Process().children()
    return [
        child.pid
        for server in servers
        for child in server.children(recursive=True)
        if "engine_process" in " ".join(child.cmdline())
    ]


# ---- report ----


def _write(report: dict[str, Any], args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"product_{'gpu' if args.device == 'cuda' else 'cpu'}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [f"# {name}", "", "; ".join(f"{k} {v}" for k, v in report["meta"].items() if isinstance(v, str)), ""]
    lines += [f"Command: `{report['command']}`. SmolLM2-135M; wall clock; each part in its own process.", ""]
    lines += ["| part | figures |", "| --- | --- |"]
    for part, figures in report.items():
        if isinstance(figures, dict) and part != "meta":
            lines.append(f"| {part} | {', '.join(_cells(figures))} |")
    lines += ["", f"Failures: {len(report['failures'])}.", *[f"- {failure}" for failure in report["failures"]]]
    text = "\n".join(lines) + "\n"
    (args.out / f"{name}.md").write_text(text)
    print(text)


def _cells(figures: dict[str, Any]) -> Iterator[str]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _cells({f"{k}": v for k, v in value.items() if isinstance(v, (int, float))})
        else:
            yield f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"


if __name__ == "__main__":
    sys.exit(main())
