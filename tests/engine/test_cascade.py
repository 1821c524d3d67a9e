"""Decode steps whose sequences begin alike read that once: the same tokens as without, and where it is not worth it, not."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn import ops
from fastattn.engine import runner as runner_module
from fastattn.engine.engine import Engine
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import load_model
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.requests import MakeEngine, only

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each call with levels, one of them a layer and step."""
    calls: list[int] = []
    plain = ops.cascade_attention

    def counted(q: Any, k: Any, v: Any, levels: Any, **options: Any) -> Any:
        calls.append(levels[1].seqused_k.shape[0])
        return plain(q, k, v, levels, **options)

    monkeypatch.setattr(ops, "cascade_attention", counted)
    return calls


def prompts(count: int, shared: int = 43) -> list[list[int]]:
    """They begin with the same tokens, and go on with 1 to 20 of their own."""
    rng = random.Random(count)
    start = [rng.randrange(2, 100) for _ in range(shared)]
    return [start + [rng.randrange(2, 100) for _ in range(rng.randint(1, 20))] for _ in range(count)]


def run(engine: Engine, wanted: list[list[int]], params: Any) -> list[list[int]]:
    outputs = tiny.run(engine, [{"prompt_token_ids": p} for p in wanted], params)
    return [list(only(output).token_ids) for output in outputs]


def texts(engine: Engine, count: int = 11) -> list[list[int]]:
    params = [SamplingParams(temperature=0.0, max_tokens=5 + 3 * i, ignore_eos=True) for i in range(count)]
    run(engine, prompts(count)[:1], params[0])  # so that all find its blocks
    return run(engine, prompts(count), params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padded": True},
        {"padded": True, "async_scheduling": True},
        {"kv_cache_dtype": "int8", "padded": True},
        {"kv_cache_dtype": "fp8"},
        {"padded": True, "speculative": SpeculativeConfig("ngram", 3)},
    ],
    ids=lambda o: " ".join(map(str, o)) or "plain",
)
def test_tokens_are_the_same(
    tokenizer: Tokenizer, levels: list[int], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    source = tiny.TinySource(config=replace(tiny.CONFIG, head_dim=16))  # 8 bits want it
    network = load_model(source, torch.device("cpu"), torch.float32, 256)
    expected = texts(tiny.make_engine(network, tokenizer, disable_cascade_attn=True, **options))
    assert not levels
    monkeypatch.setattr(runner_module, "_CASCADE_BYTES", 1)
    assert texts(tiny.make_engine(network, tokenizer, **options)) == expected
    assert levels and min(levels) >= runner_module._CASCADE_SEQS
    if options.get("padded"):
        assert 16 in levels  # eleven sequences in the shape of sixteen


def test_keys_that_are_shared_are_not_read_for_each(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, levels: list[int]
) -> None:
    """What a step of eight sequences was given: five whole blocks once, and what is behind them for each."""
    monkeypatch.setattr(runner_module, "_CASCADE_BYTES", 1)
    engine = make_engine()
    seen = []
    forward = engine.runner.model.forward

    def spy(token_ids: Any, meta: Any, *rest: Any) -> Any:
        if meta.shared is not None:
            seen.append((meta.shared.seqused_k.tolist(), meta.shared.cu_seqlens_q.tolist(), meta.seqused_k.tolist()))
        return forward(token_ids, meta, *rest)

    monkeypatch.setattr(engine.runner.model, "forward", spy)
    wanted = prompts(8)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    run(engine, wanted[:1], params)
    run(engine, wanted, params)
    assert [(shared, ends) for shared, ends, _ in seen] == [([40], [0, 8])] * 3
    assert [own for *_, own in seen] == [[len(p) + step - 40 for p in wanted] for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "why",
    ["few sequences", "few keys", "another prefix", "batch_invariant", "disable_cascade_attn", "no prefix caching"],
)
def test_not_where_it_is_not_worth_it_or_not_wanted(
    network: DecoderModel, tokenizer: Tokenizer, levels: list[int], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    heads = network.config.num_kv_heads * network.config.head_dim * 2 * 4  # bytes of a key and its value
    spared = (9 - 1) * 40 * heads
    monkeypatch.setattr(runner_module, "_CASCADE_BYTES", spared + (why == "few keys"))
    wanted = prompts(7 if why == "few sequences" else 9)
    if why == "another prefix":
        wanted[4] = prompts(10)[0]
        assert wanted[4][:8] != wanted[0][:8]
    options: dict[str, Any] = {}
    if why in ("disable_cascade_attn", "batch_invariant"):
        options[why] = True
    if why == "no prefix caching":
        options["enable_prefix_caching"] = False
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    model = network
    if why == "batch_invariant":
        model = load_model(tiny.TinySource(), torch.device("cpu"), torch.float32, 256, batch_invariant=True)
    engine = tiny.make_engine(model, tokenizer, **options)
    run(engine, wanted[:1], params)
    run(engine, wanted, params)
    assert not levels
    if not options and why != "few sequences":  # one byte less, or the one that differs away, and it is
        monkeypatch.setattr(runner_module, "_CASCADE_BYTES", spared)
        engine = tiny.make_engine(network, tokenizer)
        alike = prompts(9)
        run(engine, alike[:1], params)
        run(engine, alike, params)
        assert levels


def test_windows_have_no_levels(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, levels: list[int]) -> None:
    monkeypatch.setattr(runner_module, "_CASCADE_BYTES", 1)
    config = replace(tiny.CONFIG, sliding_window=16, layer_is_sliding=(True, False))
    network = load_model(tiny.TinySource(config=config), torch.device("cpu"), torch.float32, 256)
    texts(tiny.make_engine(network, tokenizer))
    assert not levels
