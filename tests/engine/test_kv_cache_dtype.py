"""A KV cache of 8 bits: every answer is the one that a request gets alone with the same cache, however the engine batches,
chunks, caches, preempts and guesses, and on several ranks; and it takes the memory that the plan says.

What a token leaves in the cache depends on that token alone, and a prompt reads its own keys as rounded as later steps do. So
chunks and shared prefixes change nothing but the order of sums; only a number that these last bits bring over the border
between two codes is then another, which no case here meets.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.llm import LLM
from fastattn.engine.memory_plan import PlanOptions, memory_plan
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.runner import Runner
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelFileError, open_model
from fastattn.models.registry import build_model, load_model
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import TensorParallel, kv_cache_format
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.thread_ranks import ThreadRanks

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONFIG = dataclasses.replace(tiny.CONFIG, head_dim=16, num_heads=9, num_kv_heads=3, hidden_size=72, softmax_scale=0.0)
SOURCE = tiny.TinySource(config=CONFIG)
DTYPES = ["auto", "fp8", "int8"]
PROMPTS = [
    "the quick brown fox",
    "a",
    "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on",
    "the quick brown fox is lazy",
    "the the the the the",
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, seed=7, max_tokens=24, ignore_eos=True)
PARAMS = {"greedy": GREEDY, "drawn": DRAWN}


@pytest.fixture(scope="module")
def network() -> DecoderModel:
    return load_model(SOURCE, CPU, torch.float32, 256)


@pytest.fixture(scope="module")
def smollm2() -> tuple[DecoderModel, Tokenizer]:
    try:
        source = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    return load_model(source, CPU, torch.float32, 256, batch_invariant=True), source.tokenizer()


def make(network: DecoderModel, kv_cache_dtype: str, **options: Any) -> Engine:
    return tiny.make_engine(network, SOURCE.tokenizer(), kv_cache_dtype=kv_cache_dtype, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@functools.cache
def alone(network: DecoderModel, kv_cache_dtype: str, how: str) -> list[list[int]]:
    return [tokens(tiny.run(make(network, kv_cache_dtype), [prompt], PARAMS[how]))[0] for prompt in PROMPTS]


def speculative(method: str) -> SpeculativeConfig:
    if method == "ngram":
        return SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)
    return SpeculativeConfig(num_speculative_tokens=3, model="tiny", adaptive_draft_length=False)


@pytest.mark.parametrize("how", PARAMS)
@pytest.mark.parametrize("kv_cache_dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 5, "enable_prefix_caching": False},
        {"num_kv_blocks": 13},
        {"num_kv_blocks": 13, "num_host_kv_blocks": 30},
        {"block_size": 16, "num_kv_blocks": 9, "max_num_batched_tokens": 7},
        {"padded": True, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_the_batch_changes_nothing(
    network: DecoderModel, kv_cache_dtype: str, how: str, options: dict[str, Any]
) -> None:
    params, expected = PARAMS[how], alone(network, kv_cache_dtype, how)
    engine = make(network, kv_cache_dtype, **options)
    assert tokens(tiny.run(engine, PROMPTS, params)) == expected
    assert tokens(tiny.run(engine, PROMPTS[::-1], params))[::-1] == expected
    stats = engine.stats()
    if options.get("num_kv_blocks", 128) < 20:
        assert stats.num_preemptions > 0
        block_bytes = engine.runner.kv_memory.nbytes // options["num_kv_blocks"]
        has_host = "num_host_kv_blocks" in options
        assert (stats.num_host_hit_tokens > 0) == has_host
        assert stats.num_bytes_from_host == stats.num_host_hit_tokens // 8 * block_bytes
        assert (stats.num_bytes_to_host >= block_bytes * stats.num_used_host_kv_blocks > 0) == has_host
    elif options.get("enable_prefix_caching", True):
        assert stats.num_prefix_hit_tokens > 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv_cache_dtype", DTYPES[1:])
def test_smollm2(smollm2: tuple[DecoderModel, Tokenizer], kv_cache_dtype: str) -> None:
    """A real model, alone and then in chunks, with prefixes found and requests preempted: the same tokens. Batch-invariant, since
    elsewhere a last bit of a product may let a code fall the other way, and a text go on otherwise."""
    model, tokenizer = smollm2
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "The capital of Italy is"]
    params = dataclasses.replace(GREEDY, max_tokens=16)
    options: dict[str, Any] = {"block_size": 8, "kv_cache_dtype": kv_cache_dtype, "batch_invariant": True}
    expected = [tokens(tiny.run(tiny.make_engine(model, tokenizer, **options), [p], params))[0] for p in prompts]
    engine = tiny.make_engine(model, tokenizer, num_kv_blocks=7, max_num_batched_tokens=7, max_model_len=48, **options)
    assert tokens(tiny.run(engine, prompts, params)) == expected
    assert engine.stats().num_preemptions > 0


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Engine options, and (prompt, step at which it comes) of each request."""
    options = {
        "max_num_batched_tokens": draw(st.sampled_from([3, 7, 16, 61, 256])),
        "max_num_seqs": draw(st.integers(1, 8)),
        "num_kv_blocks": draw(st.sampled_from([13, 16, 60])),
        "enable_prefix_caching": draw(st.booleans()),
        "padded": draw(st.booleans()),
    }
    if options["enable_prefix_caching"]:
        options["num_host_kv_blocks"] = draw(st.sampled_from([0, 3, 40]))
    method = draw(st.sampled_from([None, "ngram", "draft_model"]))
    if method is not None:
        options["speculative"] = speculative(method)
    request = st.tuples(st.integers(0, len(PROMPTS) - 1), st.integers(0, 12))
    return options, draw(st.lists(request, min_size=1, max_size=7))


@pytest.mark.parametrize("kv_cache_dtype", DTYPES)
@given(drawn=schedules())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)
def test_mixed_schedules(network: DecoderModel, kv_cache_dtype: str, drawn: Any) -> None:
    options, requests = drawn
    expected = alone(network, kv_cache_dtype, "greedy")
    by_model = "speculative" in options and options["speculative"].model is not None
    engine = make(network, kv_cache_dtype, **options, **({"draft": network} if by_model else {}))
    last: dict[str, list[int]] = {}
    for step in range(10_000):
        for index, (prompt, at) in enumerate(requests):
            if at == step:
                engine.add_request(str(index), PROMPTS[prompt], GREEDY)
        last |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        if step > 12 and not engine.has_unfinished_requests():
            break
    tiny.assert_idle(engine)
    assert [last[str(index)] for index in range(len(requests))] == [expected[prompt] for prompt, _ in requests]


@pytest.mark.parametrize("kv_cache_dtype", DTYPES[1:])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks(network: DecoderModel, kv_cache_dtype: str, size: int) -> None:
    """Each has the keys, values and scales of its own heads: in chunks, with prefixes shared in the second round, from the
    host's memory too, and with drafts."""
    expected = alone(network, kv_cache_dtype, "greedy")
    spec = speculative("ngram")
    group = ThreadRanks(SOURCE, size)
    engine = group.start(
        EngineConfig(
            max_model_len=128, num_kv_blocks=16, block_size=8, max_num_batched_tokens=24, max_num_seqs=6, num_host_kv_blocks=40,
            debug_checks=True, kv_cache_dtype=kv_cache_dtype, speculative=spec,
        )
    )  # fmt: skip
    try:
        for _ in range(2):
            assert tokens(tiny.run(engine, PROMPTS, GREEDY)) == expected
        assert engine.stats().num_prefix_hit_tokens > engine.stats().num_host_hit_tokens > 0
    finally:
        group.close()


@pytest.mark.parametrize("kv_cache_dtype", DTYPES[1:])
def test_a_perfect_draft_is_always_right(network: DecoderModel, kv_cache_dtype: str) -> None:
    """The draft model's cache has the target's numbers, and so its guesses are the target's own."""
    engine = make(network, kv_cache_dtype, speculative=speculative("draft_model"), draft=network)
    assert tokens(tiny.run(engine, PROMPTS, GREEDY)) == alone(network, kv_cache_dtype, "greedy")
    assert engine.stats().num_accepted_tokens == engine.stats().num_draft_tokens > 0


@pytest.mark.parametrize(("kv_cache_dtype", "error"), [("fp8", 0.3), ("int8", 0.1)])
def test_embeddings_are_nearly_those_of_the_models_dtype(
    network: DecoderModel, kv_cache_dtype: str, error: float
) -> None:
    """Nearly, and not exactly: the cache is of 8 bits. In one chunk and in many the same."""
    params = PoolingParams(pooling="last")
    exact, ours, chunked = (
        [torch.tensor(output.embedding) for output in tiny.run(make(network, name, **options), PROMPTS, params)]
        for name, options in (("auto", {}), (kv_cache_dtype, {}), (kv_cache_dtype, {"max_num_batched_tokens": 3}))
    )
    for a, b, c in zip(exact, ours, chunked, strict=True):
        assert 0 < float((a - b).norm() / a.norm()) < error
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_cache_dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2])
def test_the_memory_plan_counts_the_scales_too(kv_cache_dtype: str, size: int) -> None:
    sizes = PlanOptions(
        "cpu", torch.float32, 256, 16, 64, 8, kv_cache_dtype, num_kv_blocks=32, tensor_parallel_size=size
    )
    plan = memory_plan(CONFIG, SOURCE.tensors(), sizes, 1 << 30, 1 << 30)
    config = EngineConfig(
        max_model_len=256, num_kv_blocks=32, max_num_seqs=16, block_size=8, kv_cache_dtype=kv_cache_dtype
    )
    held = [
        Runner(build_model(CONFIG, CPU, torch.float32, 256, TensorParallel(rank, size)), config, CPU, torch.float32)
        for rank in range(size)
    ]
    assert plan.kv_bytes == held[0].kv_memory.nbytes == max(runner.kv_memory.nbytes for runner in held)
    per_head = 16 * 4 if kv_cache_dtype == "auto" else 16 + 4
    assert plan.kv_bytes_per_token == 2 * 2 * held[0].model.num_kv_heads * per_head


def test_the_same_memory_holds_more_tokens() -> None:
    """What the option is for: 64 dims in bf16 are 128 bytes, in 8 bits 68 with their scale."""
    config = dataclasses.replace(CONFIG, head_dim=64, softmax_scale=0.0)
    blocks = {}
    for name in DTYPES:
        sizes = PlanOptions("cuda", torch.bfloat16, 512, 10_000, 64, 16, name)
        blocks[name] = memory_plan(config, {}, sizes, 1 << 30, 1 << 30).num_kv_blocks
    assert blocks["fp8"] == blocks["int8"]
    assert blocks["fp8"] / blocks["auto"] == pytest.approx(128 / 68, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("fp8", torch.float8_e4m3fn),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_per_token_head", torch.float8_e4m3fn),
        ("int8", torch.int8),
        ("int8_per_token_head", torch.int8),
    ],
)
def test_names(name: str, dtype: torch.dtype) -> None:
    form = kv_cache_format(name, torch.bfloat16, 64)
    assert (form.dtype, form.has_token_scales) == (dtype, name != "auto")


def test_what_is_refused() -> None:
    """Before a weight is read."""
    allowed = "'auto', 'float32', 'bfloat16', 'float16', 'fp8', 'fp8_e4m3', 'fp8_per_token_head', 'int8', 'int8_per_token_head'"
    with pytest.raises(ValueError) as caught:
        LLM(SOURCE, device="cpu", kv_cache_dtype="fp4", quiet=True)
    assert str(caught.value) == f"kv_cache_dtype is 'fp4', allowed are {allowed}"
    with pytest.raises(ValueError) as caught:
        LLM(tiny.TinySource(), device="cpu", kv_cache_dtype="int8", quiet=True)
    assert str(caught.value) == "kv_cache_dtype is 'int8' with head_dim 8, allowed is head_dim a multiple of 16"


def test_the_option_reaches_the_cache() -> None:
    llm = LLM(SOURCE, device="cpu", kv_cache_dtype="int8", max_model_len=64, max_num_seqs=2, quiet=True)
    assert llm.engine.runner.kv_memory.values.dtype is torch.int8
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
