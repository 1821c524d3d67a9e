"""Which host blocks hold what, by itself; and the engine around it: what a failed step leaves, the option, the memory."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from fastattn.engine.config import EngineConfig
from fastattn.engine.host_tier import HostTier
from fastattn.engine.llm import LLM
from fastattn.engine.memory_plan import PlanOptions, memory_plan
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.setup import EngineOptions
from fastattn.models.registry import load_model
from fastattn.nn import KVMemory, kv_cache_format
from tests.engine import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 8
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def text(start: int, num_blocks: int) -> bytes:
    return array("i", range(start, start + num_blocks * BLOCK)).tobytes()


def put(host: HostTier, tokens: bytes, num_blocks: int, salt: bytes = b"") -> list[int | None]:
    places = host.add(salt, tokens, num_blocks)
    host.check([place for place in places if place is not None])
    host.release([place for place in places if place is not None])
    host.check([])
    return places


def found(host: HostTier, tokens: bytes, first: int = 0, salt: bytes = b"") -> list[int]:
    host.release(blocks := host.match(salt, tokens, first))
    return blocks


def test_blocks_are_found_by_all_the_text_before_them() -> None:
    host = HostTier(16, BLOCK)
    prompt = text(0, 5)
    places = put(host, prompt, 3)
    assert places == [0, 1, 2]
    assert found(host, prompt) == []  # the first two are not here
    assert found(host, prompt, 2) == places
    assert found(host, text(0, 4), 3) == places[1:2]
    other = text(100, 2) + prompt[2 * BLOCK * 4 :]
    assert found(host, other, 2) == found(host, prompt, 2, b"you") == []
    # A salt is no part of the text.
    assert found(host, prompt, 2, prompt[:4]) == []
    assert put(host, prompt, 5)[2:] == [None] * 3
    assert len(found(host, prompt)) == host.num_used == 5
    host.clear()
    assert (found(host, prompt), host.num_used) == ([], 0)


def test_ends_go_before_beginnings_and_the_oldest_first() -> None:
    host = HostTier(6, BLOCK)
    old, new = text(0, 3), text(100, 3)
    put(host, old, 3)
    put(host, new, 3)
    found(host, old)  # now the new one is older
    put(host, text(200, 1), 1)
    assert [len(found(host, prompt)) for prompt in (new, old)] == [2, 3]
    put(host, text(300, 2), 2)
    assert [len(found(host, prompt)) for prompt in (old, new)] == [3, 1]


def test_what_is_on_its_way_is_given_to_nobody() -> None:
    host = HostTier(4, BLOCK)
    first = host.add(b"", text(0, 3), 3)
    assert None not in first
    more = host.add(b"", text(100, 3), 3)
    assert more[1:] == [None, None] and more[0] not in first  # the beginning has the last place
    reading = host.match(b"", text(0, 2), 0)
    assert reading == first[:2]
    host.check([*(block for block in [*first, *more] if block is not None), *reading])
    host.release([block for block in [*first, *more] if block is not None])
    assert host.add(b"", text(200, 4), 4).count(None) == 2
    with pytest.raises(RuntimeError, match=r"invariant broken: host block \d has 2 references, not 1"):
        host.check([])


class Failing:
    """A runner's copies, of which one step's go wrong before they are made."""

    def __init__(self, copy: Any) -> None:
        self.copy, self.num_left = copy, 1

    def __call__(self, copies: Any) -> None:
        if self.num_left and any(route == 0 for *_, route in copies):
            self.num_left -= 1
            raise RuntimeError("out of magic")
        self.copy(copies)


def test_copies_that_were_not_made_are_read_by_nobody() -> None:
    source = tiny.TinySource()
    network = load_model(source, torch.device("cpu"), torch.float32, 128)
    prompts: list[Any] = [{"prompt_token_ids": list(range(start, start + 40))} for start in (2, 10, 20, 30, 40)]
    expected = [
        o.outputs[0].token_ids for o in tiny.run(tiny.make_engine(network, source.tokenizer()), prompts, GREEDY)
    ]
    engine = tiny.make_engine(
        network, source.tokenizer(), max_model_len=64, num_kv_blocks=12, num_host_kv_blocks=40, max_num_seqs=2
    )
    engine.runner._copy_blocks = failing = Failing(engine.runner._copy_blocks)  # type: ignore[method-assign]
    rounds = []
    for _ in range(3):
        outputs = tiny.run(engine, prompts, GREEDY)
        rounds.append([o.outputs[0].token_ids for o in outputs if o.outputs[0].finish_reason == "length"])
    assert failing.num_left == 0 and len(rounds[0]) < 5
    assert all(answer in expected for answer in rounds[0])
    assert rounds[1:] == [expected] * 2
    assert engine.stats().num_host_hit_tokens > 0


@pytest.mark.parametrize(("name", "scales"), [("auto", "dynamic"), ("int8", "dynamic"), ("fp8", "calculate")])
def test_a_block_is_all_layers_keys_values_and_scales(name: str, scales: str) -> None:
    """Of one block of seven, by each of the views that blocks are moved by; what layers see is the same memory."""
    memory = KVMemory(kv_cache_format(name, torch.bfloat16, 16, scales), 3, 7, BLOCK, 2, 16, torch.device("cpu"))
    paged = [t for layer in memory.layers for t in layer if t.dim() > 1]
    assert len(paged) == 3 * (4 if (name, scales) == ("int8", "dynamic") else 2)
    for views in (memory.by_token, memory.by_layer):
        for tensor in paged:
            tensor.view(torch.uint8).zero_()
        for view in views:
            view[3] = 1
        for tensor in paged:
            assert (tensor[3] == 1).all()
            assert (tensor[[0, 1, 2, 4, 5, 6]].float() == 0).all()
    assert memory.nbytes == sum(t.nbytes for t in paged)
    host = memory.on_host(5)
    assert [(h.dtype, h.shape[1:], h.stride(0)) for h in host] == [(t.dtype, t.shape[1:], t.stride(0)) for t in memory.by_layer]  # fmt: skip
    assert sum(h.nbytes for h in host) == 5 * memory.nbytes // 7


def test_the_option_is_a_size_that_plan_and_engine_agree_on() -> None:
    source = tiny.TinySource()
    options = {"max_model_len": 64, "max_num_seqs": 2, "block_size": 8, "num_kv_blocks": 10}
    llm = LLM(source, device="cpu", kv_offloading_size=0.001, quiet=True, **options)
    runner = llm.engine.runner
    block_bytes = runner.kv_memory.nbytes // 10
    assert runner.config.num_host_kv_blocks == int(0.001 * 2**30) // block_bytes > 100
    assert sum(view.nbytes for view in runner.host_blocks) == runner.config.num_host_kv_blocks * block_bytes
    sizes = PlanOptions("cpu", torch.float32, 64, 2, 512, 8, num_kv_blocks=10, kv_offloading_bytes=int(0.001 * 2**30))
    plan = memory_plan(source.config, source.tensors(), sizes, 1 << 30, 1 << 30)
    assert plan.num_host_kv_blocks == runner.config.num_host_kv_blocks
    without = memory_plan(source.config, source.tensors(), PlanOptions("cpu", torch.float32, 64, 2, 512, 8, num_kv_blocks=10), 1 << 30, 1 << 30)  # fmt: skip
    assert plan.total_bytes - without.total_bytes == plan.host_kv_bytes == block_bytes * plan.num_host_kv_blocks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineOptions(kv_offloading_size=0), "kv_offloading_size is 0, allowed is above 0, below 1e6 (GiB)"),
        (
            lambda: EngineOptions(kv_offloading_size=4, enable_prefix_caching=False),
            "kv_offloading_size is 4 with enable_prefix_caching False, allowed is None there: host memory is a second tier of "
            "the prefix cache",
        ),
        (
            lambda: EngineConfig(64, 8, num_host_kv_blocks=-1),
            "EngineConfig: num_host_kv_blocks is -1, allowed is an integer from 0 to 2**31 - 1",
        ),
        (
            lambda: EngineConfig(64, 8, num_host_kv_blocks=3, enable_prefix_caching=False),
            "EngineConfig: num_host_kv_blocks is 3 without enable_prefix_caching, allowed is 0: it is the prefix cache's",
        ),
        (
            lambda: LLM(tiny.TinySource(), device="cpu", kv_offloading_size=1e-7, quiet=True),
            "tiny: kv_offloading_size is 107 bytes, and a block takes 4096 on each of 1 ranks",
        ),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert message in str(caught.value)


def test_more_than_the_host_has() -> None:
    with pytest.raises(ValueError, match=r"bytes are needed, \d+ "):
        LLM(tiny.TinySource(), device="cpu", kv_offloading_size=90_000, num_kv_blocks=600, quiet=True)
