"""Ranks as processes: they start, give the same text, and end together, however one of them ends. Nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import LLM, AsyncEngine, SamplingParams, StructuredOutput
from fastattn.engine import rank_link
from fastattn.engine.async_engine import EngineDeadError
from fastattn.engine.batch import Step
from fastattn.engine.rank_link import connect
from fastattn.engine.ranks import RankError, _LateStep
from fastattn.models.loader import ModelFileError, open_model
from tests.engine.prompts import PROMPTS
from tests.engine.test_tensor_parallel import MODELS, assert_logprobs_close
from tests.engine.tiny import TinySource, write_folder

pytestmark = pytest.mark.timeout(300)

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": 512, "num_kv_blocks": 256, "quiet": True,
    "rank_timeout_seconds": 60,  # who has to wait for a busy machine is not late
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(TinySource(config=MODELS["9-and-3-heads"]), tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    shared, children = {*os.listdir("/dev/shm")}, running_children()
    yield
    assert wait_for(lambda: {*os.listdir("/dev/shm")} <= shared, 20), "shared memory stays"
    assert wait_for(lambda: running_children() <= children, 20), "a rank runs on"


def test_a_message_is_as_long_as_it_is() -> None:
    """A step that copies 100,000 blocks has one of 1.6 MB; a socket takes 213 kB at a time, where nobody set another limit."""
    ours, theirs = rank_link.Link.pair()
    ours.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 106_496)  # the kernel doubles it
    copies = tuple((i, i + 1, 16, i % 3) for i in range(100_000))
    step = Step(7, 1, 1, 7, 1000, copies=copies)
    with ThreadPoolExecutor(1) as pool:
        for message in (step.to_bytes(), b"x", b"y" * (1 << 16), b"z" * ((1 << 16) + 1)):
            received = pool.submit(theirs.receive, 60)
            ours.send(message, (ours.socket.fileno(),))
            assert received.result() == (message, [])  # who wants no descriptors gets none
        assert Step.from_bytes(step.to_bytes()) == step
        received = pool.submit(theirs.receive, 60, 2)
        ours.send(b"x" * 200_000, (0, 1))
        message, fds = received.result()
        assert len(message) == 200_000 and len(fds) == 2
        for fd in fds:
            os.close(fd)
    with pytest.raises(TimeoutError):  # nobody reads
        ours.send(step.to_bytes(), timeout=0.1)
    theirs.close()
    with pytest.raises(rank_link.LinkClosedError):
        ours.send(b"x")


def read_link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # of the listing itself
        return ""


def running_children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile, or a kernel that does not list them
            found.update(map(int, (task / "children").read_text().split()))
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def texts(llm: LLM, prompts: list[str], params: SamplingParams = GREEDY) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def pids(llm: LLM) -> list[int]:
    ranks = llm.engine.runner.ranks
    assert ranks is not None
    return [member.pid for member in ranks.members]


def test_two_ranks_and_one_give_the_same_text(folder: str) -> None:
    expected = texts(LLM(folder, **OPTIONS), PROMPTS[:6])
    threads = torch.get_num_threads()
    llm = LLM(folder, tensor_parallel_size=2, **OPTIONS)
    assert texts(llm, PROMPTS[:6]) == expected
    assert len(pids(llm)) == 1
    llm.close()
    llm.close()
    assert not runs(pids(llm)[0])
    assert torch.get_num_threads() == threads
    with pytest.raises(RankError, match="was closed"):
        texts(llm, PROMPTS[:1])


def test_whatever_a_request_asks_for(folder: str) -> None:
    """In one batch, greedy and drawn, twice, so that prefixes are shared; and embeddings after it."""
    form = StructuredOutput("json_schema", '{"type": "array", "items": {"enum": [1, "ab", null]}, "maxItems": 3}')
    asked: list[dict[str, Any]] = [
        {"structured_output": form},
        {"structured_output": StructuredOutput("regex", "([a-z]{2}[0-9]){2,6}")},
        {"logprobs": 3, "prompt_logprobs": 2},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"logit_bias": {5: 4.0}, "min_tokens": 8, "stop_token_ids": [5], "n": 2},
        {"min_p": 0.05, "top_p": 0.9, "logprobs": 1},
    ]
    params = [SamplingParams(max_tokens=16, temperature=0, **a) for a in asked if "n" not in a]
    params += [SamplingParams(max_tokens=16, temperature=1, seed=seed, **a) for seed, a in enumerate(asked)]
    prompts = [PROMPTS[i % 4] for i in range(len(params))]
    found = []
    for size in (1, 2):
        llm = LLM(folder, tensor_parallel_size=size, **OPTIONS)
        outputs = [o for _ in range(2) for o in llm.generate(prompts, params, use_tqdm=False)]
        vectors = [o.embedding for o in llm.embed(prompts[:3], use_tqdm=False)]
        llm.close()
        llm.engine._intake._grammars._sandbox.close()  # the process that compiles grammars is no rank
        found.append((outputs, vectors))
    (alone, alone_vectors), (shared, shared_vectors) = found
    for a, b in zip(shared, alone, strict=True):
        assert [(o.token_ids, o.text, o.finish_reason) for o in a.outputs] == [
            (o.token_ids, o.text, o.finish_reason) for o in b.outputs
        ]
        for one, other in zip(a.outputs, b.outputs, strict=True):
            assert_logprobs_close(one.logprobs, other.logprobs)
        assert_logprobs_close(a.prompt_logprobs, b.prompt_logprobs)
    assert shared[2].prompt_logprobs is not None
    for one, other in zip(shared_vectors, alone_vectors, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_groups_that_start_at_the_same_time(folder: str) -> None:
    """Each finds its own ranks: nothing of a group has a name or a port that another could take."""
    threads = torch.get_num_threads()
    expected = texts(LLM(folder, **OPTIONS), PROMPTS[:2])
    with ThreadPoolExecutor(2) as pool:
        llms = list(pool.map(lambda _: LLM(folder, tensor_parallel_size=2, **OPTIONS), range(2)))
        assert list(pool.map(lambda llm: texts(llm, PROMPTS[:2]), llms)) == [expected] * 2
    os.kill(pids(llms[0])[0], signal.SIGKILL)
    with pytest.raises(RankError, match="was killed by signal 9"):
        texts(llms[0], PROMPTS[:1])
    assert texts(llms[1], PROMPTS[:2]) == expected
    for llm in llms:
        llm.close()
    torch.set_num_threads(threads)  # each gives back the number that it found, and the second found the first's


def test_ranks_end_with_an_engine_that_nobody_holds(folder: str) -> None:
    llm = LLM(folder, tensor_parallel_size=2, **OPTIONS)
    (pid,) = pids(llm)
    del llm
    gc.collect()
    assert wait_for(lambda: not runs(pid), 20)
    assert not [link for link in map(read_link, Path("/proc/self/fd").iterdir()) if "memfd:fastattn" in link]


def test_a_group_goes_while_its_old_file_numbers_are_taken(folder: str, tmp_path: Path) -> None:
    """torch's store opens its path once more when it goes; from a file that is not its own it would never come back."""
    other = tmp_path / "other"
    other.write_bytes(b"\x7f\x31\x20\x31" * 1000)
    program = f"""
import gc, os
from fastattn import LLM
llm = LLM({folder!r}, tensor_parallel_size=2, **{OPTIONS!r})
llm.close()
files = [open({str(other)!r}, "r+b") for _ in range(200)]
del llm
gc.collect()
print("gone")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout == "gone\n", done.stderr


def kill(number: signal.Signals) -> Callable[[Any], None]:
    return lambda member: os.kill(member.pid, number)


@pytest.mark.parametrize(
    ("rank", "how", "limit", "said"),
    [
        (1, kill(signal.SIGKILL), 60, r"rank 1 \(process PID\) was killed by signal 9 \(SIGKILL\)"),
        (2, kill(signal.SIGKILL), 60, r"rank 2 \(process PID\) was killed by signal 9 \(SIGKILL\)"),
        (2, kill(signal.SIGSTOP), 2, r"rank 2 \(process PID\) did not answer in time"),
        (1, lambda lost: lost.link.send(b"no step"), 60, r"rank 1 \(process PID\) failed: error: unpack_from requires"),
    ],
    ids=["kill-1", "kill-2", "hang", "exception"],
)
def test_a_rank_that_is_lost_is_named_and_ends_the_group(
    folder: str, rank: int, how: Any, limit: float, said: str
) -> None:
    llm = LLM(folder, tensor_parallel_size=3, **OPTIONS | {"rank_timeout_seconds": limit})
    ranks = llm.engine.runner.ranks
    assert ranks is not None
    member = ranks.members[rank - 1]
    outputs = llm.stream(PROMPTS[:3], ENDLESS)
    assert not any(next(outputs).finished for _ in range(8))
    how(member)
    lost = time.monotonic()
    with pytest.raises(RankError) as raised:
        list(outputs)
    assert time.monotonic() - lost < 6  # 2 to see that one hangs, half a second to hear who else has
    raised.match(r"^tensor parallelism over 3 ranks has ended: " + said.replace("PID", str(member.pid)))
    assert not any(map(runs, pids(llm)))
    with pytest.raises(RankError, match=f"rank {rank}"):
        texts(llm, PROMPTS[:1])


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "closed"])
def test_nothing_waits_for_what_never_ends(folder: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving NCCL up may hang for as long as it likes, and a rank that is told to end may not hear it."""
    monkeypatch.setattr("fastattn.engine.rank_watch._LEAVE_SECONDS", 0.5)
    llm = LLM(folder, tensor_parallel_size=2, **OPTIONS)
    ranks, forever = llm.engine.runner.ranks, threading.Event()
    assert ranks is not None
    ranks._watch.abort = lambda: [forever.wait()]
    (pid,) = pids(llm)
    os.kill(pid, signal.SIGKILL if lost else signal.SIGSTOP)
    start = time.monotonic()
    if lost:
        with pytest.raises(RankError, match="was killed by signal 9"):
            texts(llm, PROMPTS[:1])
    llm.close()
    assert time.monotonic() - start < 5
    assert not runs(pid)
    forever.set()


def test_a_rank_that_is_lost_while_all_connect(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who connects would wait for it for a minute, with NCCL for ever."""
    killed = []

    def kill_and_connect(*arguments: Any) -> Any:
        (rank,) = running_children() - before
        os.kill(rank, signal.SIGKILL)
        killed.append(time.monotonic())
        return connect(*arguments)

    monkeypatch.setattr("fastattn.engine.ranks.connect", kill_and_connect)
    before = running_children()
    with pytest.raises(RankError, match=r"rank 1 \(process \d+\) was killed by signal 9"):
        LLM(folder, tensor_parallel_size=2, **OPTIONS)
    assert time.monotonic() - killed[0] < 5


def test_a_late_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is launched, and while it runs; once it has ended the device is left alone."""
    ended, asked = False, 0

    class Event:
        def record(self) -> None: ...

        def query(self) -> bool:
            nonlocal asked
            asked += 1
            return ended

    monkeypatch.setattr(torch.cuda, "Event", Event)
    late = _LateStep(0.0)
    assert not late.is_late()
    with late:
        assert late.is_late()
    assert late.is_late()
    ended = True
    assert not late.is_late()
    assert (late.is_late(), asked) == (False, 2)
    with late:
        assert late.is_late()


def test_what_torch_reads_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is the user's, who may train beside us."""
    first, second, *_ = rank_link._NCCL_ENVIRONMENT
    monkeypatch.setenv(first, "3")
    monkeypatch.delenv(second, raising=False)
    before = dict(os.environ)
    with rank_link._environment(rank_link._NCCL_ENVIRONMENT):
        assert os.environ[first] == os.environ[second] == "0"
    assert os.environ == before


def test_our_own_part_that_fails_ends_the_group(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for an exchange that never comes, so no later step is possible."""
    llm = LLM(folder, tensor_parallel_size=2, **OPTIONS)

    def fails(*_: Any) -> Any:
        raise MemoryError("no more")

    monkeypatch.setattr(llm.engine.runner.model, "logits", fails)
    with pytest.raises(RankError, match="rank 0 failed: MemoryError: no more"):
        texts(llm, PROMPTS[:1])
    assert not any(map(runs, pids(llm)))


def test_an_interrupt_within_a_step_ends_the_group(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next step's exchanges would be added to what is left of this one's."""
    llm = LLM(folder, tensor_parallel_size=2, **OPTIONS)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner.model, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        texts(llm, PROMPTS[:1])
    monkeypatch.undo()
    with pytest.raises(RankError, match=r"rank 0 failed: KeyboardInterrupt$"):
        texts(llm, PROMPTS[:1])


def test_a_rank_that_ends_while_nothing_runs_is_noticed(folder: str) -> None:
    """Also by the asynchronous front, which is asleep then."""
    llm = LLM(folder, tensor_parallel_size=3, **OPTIONS)
    front = AsyncEngine(llm.engine)
    first, second = pids(llm)
    os.kill(second, signal.SIGKILL)
    assert wait_for(lambda: not runs(first), 20)
    assert wait_for(lambda: not front.is_alive, 20)

    async def ask() -> None:
        async for _ in front.generate("hello", GREEDY, "a"):
            pass

    with pytest.raises(EngineDeadError, match=r"rank 2 \(process \d+\) was killed by signal 9"):
        asyncio.run(ask())


PARENT = f"""
import os, sys, threading
from fastattn import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=3, **{OPTIONS!r})
print(*(member.pid for member in llm.engine.runner.ranks.members), flush=True)
endless = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
while True:
    llm.generate(["hello"] * 2, endless, use_tqdm=False)
"""


@pytest.mark.parametrize("paused", [False, True], ids=["running", "with-a-stopped-rank"])
def test_no_rank_outlives_rank_0(folder: str, paused: bool) -> None:
    """Killed in the middle of a step; a rank that is stopped cannot see that itself, the kernel ends it."""
    with subprocess.Popen([sys.executable, "-c", PARENT, folder], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ranks = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert len(ranks) == 2 and all(map(runs, ranks))
            if paused:
                os.kill(ranks[0], signal.SIGSTOP)
            time.sleep(0.2)
        finally:
            parent.kill()
        assert wait_for(lambda: not any(map(runs, ranks)), 20)


TORCHRUN = f"""
import sys
from fastattn import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=int(sys.argv[2]), **{OPTIONS!r})
greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
outputs = llm.generate(sys.argv[3:], greedy, use_tqdm=False)
print("tokens", [output.outputs[0].token_ids for output in outputs], flush=True)
"""


def torchrun(script: Path, size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [*command, arguments[0], str(size), *arguments[1:]], capture_output=True, text=True, timeout=120
    )


def test_torchrun(folder: str, tmp_path: Path) -> None:
    """Its processes are the ranks: one prints, and both end without an error."""
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    done = torchrun(script, 2, folder, *PROMPTS[:3])
    assert done.returncode == 0, done.stderr
    expected = texts(LLM(folder, **OPTIONS), PROMPTS[:3])
    assert done.stdout.count("tokens") == 1
    assert f"tokens {expected}" in done.stdout
    wrong = torchrun(script, 3, folder, "hello")
    assert wrong.returncode != 0
    assert "tensor_parallel_size is 3, but torchrun started WORLD_SIZE = 2 processes" in wrong.stderr


def test_what_cannot_work_is_said_before_anything_starts(folder: str) -> None:
    for size, said in ((0, "allowed is an integer from 1"), (10, "allowed is up to 9 for this model")):
        with pytest.raises(ValueError, match=f"tensor_parallel_size is {size}, {said}"):
            LLM(folder, tensor_parallel_size=size, **OPTIONS)
    with pytest.raises(ValueError, match="each rank opens the model by its path, and 'tiny' is none"):
        LLM(TinySource(), tensor_parallel_size=2, **OPTIONS)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """The error is that of one rank, and the others are gone."""
    broken = write_folder(TinySource(), tmp_path)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.no_proj"))
    with pytest.raises(ValueError, match="missing, first 'model"):
        LLM(str(broken), tensor_parallel_size=2, **OPTIONS)


# ---- a real model ----


@pytest.mark.parametrize(
    ("size", "num_prompts", "num_tokens"),
    [
        pytest.param(2, 4, 12, id="2"),
        pytest.param(3, 4, 12, id="3"),
        pytest.param(2, 50, 64, id="2-all", marks=pytest.mark.slow),
        pytest.param(3, 50, 64, id="3-all", marks=pytest.mark.slow),
        pytest.param(4, 50, 64, id="4-all", marks=pytest.mark.slow),
    ],
)
def test_smollm2_is_token_exact(size: int, num_prompts: int, num_tokens: int) -> None:
    """9 query and 3 KV heads, over gloo, batched and in chunks; judged by transformers where it is not the same as alone."""
    from tests.engine.test_token_exact import opened

    try:
        open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    prompts = PROMPTS[:: len(PROMPTS) // num_prompts][:num_prompts]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    options = OPTIONS | {"max_num_batched_tokens": 64, "max_model_len": 1024}
    expected = texts(LLM("smollm2", **options), prompts, params)
    llm = LLM("smollm2", tensor_parallel_size=size, **options)
    try:
        found = texts(llm, prompts, params)
    finally:
        llm.close()
    if found != expected:  # only near ties may differ, and transformers says whether they are
        exact = opened(("smollm2", num_prompts, num_tokens))
        for index, tokens in enumerate(found):
            exact.compare(index, tokens)
