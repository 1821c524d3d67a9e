"""Two GPUs share SmolLM2 in bf16 over NCCL: the text is that of one but at near ties, eager and with graphs; a rank that is
lost is named, and the process lives on; a group goes as fast as it should.

Whoever waits for a GPU that waits for another cannot be stopped from Python. So each case is a process of its own, which after
its time says where all of its threads are, and its ranks' too, and ends. By hand, also without a GPU:

    python -m tests.gpu.test_tensor_parallel lost-graphs 60 cpu
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import LLM, SamplingParams
from fastattn.engine.ranks import RankError
from fastattn.models.loader import ModelFileError, open_model
from tests.engine.exact import hf_model
from tests.engine.prompts import PROMPTS

FIGURE = "figure: "
DEVICE, NUM_TOKENS = "cuda", 64
ENDLESS = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
Texts = list[tuple[list[int], list[int]]]  # (prompt, output) token ids


# ---- what pytest sees ----


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "seconds"),
    [
        ("eager", 75),
        ("graphs", 75),
        ("close", 50),
        ("lost-graphs", 50),
        ("lost-eager", 40),
        ("late", 45),
    ],
)
def test_two_gpus(case: str, seconds: int, tmp_path: Path) -> None:
    """One that hangs costs its seconds and no more; all together are meant to take less than three minutes."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices, two are needed")
    try:
        open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    # A file, since what hangs in a driver keeps a pipe open; and a rank that is told to abort says where it is.
    with (tmp_path / "said").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.test_tensor_parallel", case, str(seconds)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        process.wait(seconds + 15)
    except subprocess.TimeoutExpired:
        process.kill()  # the ranks go with it
    said = (tmp_path / "said").read_text(errors="replace")
    print(said)
    for line in said.splitlines():
        if line.startswith(FIGURE):
            warnings.warn(f"{case}: {line.removeprefix(FIGURE)}", stacklevel=1)
    assert process.returncode == 0, f"{case} ended with {process.returncode}:\n{said[-6000:]}"


# ---- what runs in a process of its own ----


def figure(text: str) -> None:
    print(f"{FIGURE}{text}", flush=True)


def start(size: int = 2, **options: Any) -> LLM:
    on_gpu = DEVICE == "cuda"
    base = {"device": DEVICE, "dtype": "bfloat16" if on_gpu else "float32", "max_model_len": 2048, "quiet": True}
    return LLM("smollm2", tensor_parallel_size=size, **(base | {"num_kv_blocks": 4096 if on_gpu else 512} | options))


def texts(llm: LLM, prompts: list[str]) -> Texts:
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [(o.prompt_token_ids, o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]


def timed(llm: LLM, prompts: list[str]) -> tuple[Texts, float]:
    """Texts, and tokens a second; the first round records graphs and is not timed."""
    texts(llm, prompts)
    begin = time.perf_counter()
    found = texts(llm, prompts)
    return found, len(prompts) * NUM_TOKENS / (time.perf_counter() - begin)


@torch.inference_mode()
def check_near_ties(found: Texts) -> int:
    """Each token is fp32's best, or so near that the rounding of bf16 decides: by at most four times the error that
    transformers' logits have in bf16 (as in test_model). Returns how many were not the best."""
    exact_model = hf_model(open_model("smollm2")).to(DEVICE)
    plain_model = hf_model(open_model("smollm2")).to(DEVICE).bfloat16()
    num_ties = 0
    for prompt, tokens in found:
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        exact, plain = (
            m(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() for m in (exact_model, plain_model)
        )
        chosen = exact.gather(1, torch.tensor(tokens, device=DEVICE)[:, None])[:, 0]
        short, allowed = exact.amax(1) - chosen, 4 * float((plain - exact).abs().max())
        assert float(short.max()) <= allowed, (
            f"a token is {float(short.max()):.3f} below fp32's best, allowed {allowed:.3f}"
        )
        num_ties += int((short > 0).sum())
    return num_ties


def compare(what: dict[str, dict[str, Any]]) -> None:
    """The first's text is each other's, but for near ties. For one request, and for many at once."""
    many = PROMPTS if DEVICE == "cuda" else PROMPTS[:4]
    results: dict[str, list[tuple[Texts, float]]] = {}
    for name, options in what.items():
        llm = start(**options)
        results[name] = [timed(llm, many[:1]), timed(llm, many)]
        llm.close()
        del llm
        gc.collect()
    first, *others = results
    for name in results:
        figure(f"{name}: {results[name][0][1]:.0f} tokens/s for one request, {results[name][1][1]:.0f} for {len(many)}")
    for name in others:
        pairs = [
            (a, b)
            for (found, _), (wanted, _) in zip(results[name], results[first], strict=True)
            for a, b in zip(found, wanted, strict=True)
        ]
        other = [a for a, b in pairs if a != b]
        num_ties = check_near_ties(other) if other else 0
        figure(f"{name} and {first}: {len(pairs) - len(other)} of {len(pairs)} texts equal, {num_ties} near ties")


def case_eager() -> None:
    compare({"one GPU": {"size": 1, "use_cuda_graphs": False}, "two GPUs": {"use_cuda_graphs": False}})


def case_graphs() -> None:
    compare({"eager": {"use_cuda_graphs": False}, "graphs": {}, "graphs on one GPU": {"size": 1}})


def lose(how: signal.Signals, within_seconds: float, again: bool = False, **options: Any) -> None:
    """Rank 1, while rank 0 waits for a stream that waits for the other GPU. The process lives on, and can start ``again``."""
    llm = start(**options)
    expected = texts(llm, PROMPTS[:2])
    ranks = llm.engine.runner.ranks
    assert ranks is not None
    pid = ranks.members[0].pid
    outputs = llm.stream(PROMPTS[:8], ENDLESS)
    assert not any(next(outputs).finished for _ in range(80))
    os.kill(pid, how)
    lost = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 \(process {pid}\)") as raised:
        list(outputs)
    seconds = time.monotonic() - lost
    figure(f"{seconds:.2f} s after {how.name}: {raised.value}")
    del raised  # its traceback has what the group was made of
    assert seconds < within_seconds
    close(llm, "close() after it")
    if DEVICE == "cuda":
        assert torch.ones(1000, device="cuda").sum().item() == 1000
    del llm, outputs
    gc.collect()
    if not again:
        return
    begin = time.monotonic()
    llm = start(**options)
    assert texts(llm, PROMPTS[:2]) == expected
    figure(f"{time.monotonic() - begin:.1f} s to start another and answer")
    close(llm, "close()")


def close(llm: LLM, what: str) -> None:
    begin = time.monotonic()
    llm.close()
    seconds = time.monotonic() - begin
    ranks = llm.engine.runner.ranks
    assert ranks is not None
    endings = [str(member.ending()) for member in ranks.members]
    threads = [t.name for t in threading.enumerate() if t.name.startswith("fastattn")]
    figure(f"{what}: {seconds:.2f} s; rank 1 {endings[0]}; threads that go on: {threads or 'none'}")
    assert seconds < 5


def case_close() -> None:
    """Two groups on the same GPUs, with graphs; one is closed, the other works on, and then nobody holds it."""
    one = start()
    expected = texts(one, PROMPTS[:2])
    two = start()
    assert texts(two, PROMPTS[:2]) == expected == texts(one, PROMPTS[:2])
    close(one, "close()")
    del one
    assert texts(two, PROMPTS[:2]) == expected
    ranks = two.engine.runner.ranks
    assert ranks is not None
    (member,) = ranks.members
    del two, ranks
    begin = time.monotonic()
    gc.collect()
    figure(f"{time.monotonic() - begin:.2f} s for a group that nobody holds")
    assert time.monotonic() - begin < 5
    assert member.ending() is not None


CASES: dict[str, Callable[[], None]] = {
    "close": case_close,
    "lost-graphs": lambda: lose(signal.SIGKILL, 5, again=True),
    "lost-eager": lambda: lose(signal.SIGKILL, 5, use_cuda_graphs=False),
    "late": lambda: lose(signal.SIGSTOP, 12, rank_timeout_seconds=8),
    "eager": case_eager,
    "graphs": case_graphs,
}


def end_after(seconds: float) -> None:
    """Ends this process, after it and its ranks have said where they are; even if a thread of it never lets go of Python."""
    faulthandler.dump_traceback_later(seconds + 5, exit=True)

    def end() -> None:
        print(f"not done after {seconds:.0f} s", flush=True)
        faulthandler.dump_traceback()
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):  # a thread or a rank that has ended meanwhile
                for pid in (task / "children").read_text().split():
                    os.kill(int(pid), signal.SIGCONT)
                    os.kill(int(pid), signal.SIGABRT)
        time.sleep(2)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def main(case: str, seconds: str) -> None:
    end_after(float(seconds))
    shared = sorted(os.listdir("/dev/shm"))
    CASES[case]()
    left = sorted(set(os.listdir("/dev/shm")) - set(shared))
    assert not left, f"left in /dev/shm: {left}"


if __name__ == "__main__":
    if sys.argv[3:] == ["cpu"]:
        DEVICE, NUM_TOKENS = "cpu", 8
    main(*sys.argv[1:3])
