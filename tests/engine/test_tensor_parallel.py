"""The tokens of one rank are those of two, three and four, whatever the model looks like and whatever the engine does.

Sums over ranks are added in another order, so logits differ in their last bits. Tokens must be equal all the same, but where
the two best logits are nearer to each other than that; such a place is checked, warned of and counted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.memory_plan import PlanOptions, memory_plan
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.runner import Runner
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.structured_output import StructuredOutput
from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.decoder import DecoderModel
from fastattn.models.registry import build_meta, build_model, load_model
from fastattn.nn import TensorParallel
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.exact import NEAR_TIE
from tests.engine.thread_ranks import ThreadRanks

pytestmark = pytest.mark.usefixtures("one_thread")


def variant(**changes: Any) -> ModelConfig:
    return dataclasses.replace(tiny.CONFIG, **({"softmax_scale": 0.0, "layer_is_sliding": ()} | changes))


# The tiny vocabulary has 107 entries, which no number of ranks divides.
MODELS = {
    "9-and-3-heads": variant(hidden_size=72, num_heads=9, num_kv_heads=3, intermediate_size=100),
    "tied": variant(tie_word_embeddings=True, num_heads=8, num_kv_heads=4),
    "biases": variant(attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "one-kv-head": variant(num_kv_heads=1),
    "qk-norm": variant(architecture="qwen3", qk_norm=True, head_dim=16),
    "gemma3": variant(
        architecture="gemma3",
        qk_norm=True,
        activation="gelu_tanh",
        tie_word_embeddings=True,
        embed_scale=32**0.5,
        sliding_window=12,
        layer_is_sliding=(True, False),
        rope_local=RopeConfig(theta=1000.0),
        final_softcap=30.0,
        num_kv_heads=1,
    ),
}
PROMPTS = [
    "the quick brown fox jumps over the lazy dog",
    "a",
    "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on",
    "the quick brown fox is lazy",
    "What is 00?",
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
OPTIONS: dict[str, Any] = {"max_model_len": 256, "num_kv_blocks": 128, "block_size": 8, "debug_checks": True}


@dataclasses.dataclass
class Pair:
    """An engine of one rank and, made anew for each set of options, one of several."""

    config: ModelConfig
    size: int
    near_ties: int = 0

    def __post_init__(self) -> None:
        self.source = tiny.TinySource(config=self.config)
        self.network: DecoderModel = load_model(self.source, torch.device("cpu"), torch.float32, 256)
        self.groups: list[ThreadRanks] = []

    def alone(self, **options: Any) -> Engine:
        return tiny.make_engine(self.network, self.source.tokenizer(), **options)

    def shared(self, draft: DecoderModel | None = None, **options: Any) -> Engine:
        self.groups.append(ThreadRanks(self.source, self.size))
        return self.groups[-1].start(EngineConfig(**(OPTIONS | options)), draft)

    def close(self) -> None:
        for group in self.groups:
            group.close()

    def compare(self, ours: list[RequestOutput], alone: list[RequestOutput]) -> None:
        for a, b in zip(ours, alone, strict=True):
            assert a.prompt_token_ids == b.prompt_token_ids
            for one, other in zip(a.outputs, b.outputs, strict=True):
                self._compare(a.prompt_token_ids, one.token_ids, other.token_ids)
        assert self.near_ties <= 1

    def _compare(self, prompt: list[int], ours: list[int], alone: list[int]) -> None:
        assert len(ours) == len(alone)
        if ours == alone:
            return
        at = next(i for i, (a, b) in enumerate(zip(ours, alone, strict=True)) if a != b)
        logits = tiny.full_logits(self.network, prompt + alone[:at])[-1]
        gap = float(logits[alone[at]] - logits[ours[at]])
        assert abs(gap) < NEAR_TIE, f"token {at} is {ours[at]}, alone {alone[at]}, whose logit is {gap:.2e} higher"
        self.near_ties += 1
        warnings.warn(f"near tie at token {at}: {gap:.2e}", stacklevel=2)


# Every kind of part: KV heads that are divided evenly, unevenly, and replicated.
CASES = [("9-and-3-heads", size) for size in (2, 3, 4)] + [("gemma3", 2), ("gemma3", 4)]
CASES += [("tied", 3), ("biases", 2), ("biases", 4), ("one-kv-head", 3), ("qk-norm", 2), ("qk-norm", 3)]


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    name, size = request.param
    made = Pair(MODELS[name], size)
    yield made
    made.close()


@pytest.fixture(params=[2, 3])
def odd(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """9 query and 3 KV heads."""
    made = Pair(MODELS["9-and-3-heads"], request.param)
    yield made
    made.close()


def test_every_model_on_every_number_of_ranks(pair: Pair) -> None:
    """Batched, in chunks, with prefixes shared in the second round; and each rank holds a part, not the whole."""
    alone = tiny.run(pair.alone(), PROMPTS, GREEDY)
    engine = pair.shared(max_num_batched_tokens=24, max_num_seqs=4)
    pair.compare(tiny.run(engine, PROMPTS, GREEDY), alone)
    pair.compare(tiny.run(engine, PROMPTS, GREEDY), alone)
    assert engine.stats().num_prefix_hit_tokens % OPTIONS["block_size"] > 0  # copied beginnings of blocks among them
    runners = [engine.runner, *pair.groups[0].runners]
    total = sum(w.out.numel() for w in pair.network.weights())
    held = [sum(w.out.numel() for w in runner.model.weights()) for runner in runners]
    replicated = total // 8  # norms, and KV heads where there are more ranks than of them
    assert total <= sum(held) <= total + pair.size * replicated
    assert max(held) == held[0] < total * (0.9 if pair.size == 2 else 0.7)


def test_logits_of_the_ranks_are_those_of_one(pair: Pair) -> None:
    """To the last bits of fp32, for every position of a prompt."""
    from fastattn._runtime import TokenSequence

    sequence = TokenSequence(pair.source.tokenizer().encode(PROMPTS[2]))
    runner = pair.shared().runner
    sequence.add_blocks(list(range(-(-len(sequence) // 8))))
    step = dataclasses.replace(runner.buffers.fill([sequence], [len(sequence)]), extra_rows=((0, len(sequence)),))
    (logits,) = runner.compute(step).extra_logits
    torch.testing.assert_close(logits, tiny.full_logits(pair.network, sequence.tokens()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 14},
        {"max_num_batched_tokens": 5, "enable_prefix_caching": False},
        {"policy": "priority", "max_num_seqs": 2},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
    ],
    ids=str,
)
def test_what_the_engine_does_changes_nothing(odd: Pair, options: dict[str, Any]) -> None:
    engine = odd.shared(**options)
    odd.compare(tiny.run(engine, PROMPTS, GREEDY), tiny.run(odd.alone(), PROMPTS, GREEDY))
    if "num_kv_blocks" in options:
        assert engine.stats().num_preemptions > 0


def test_what_requests_ask_for(odd: Pair) -> None:
    """Penalties, bias, seeds, n, stops and log-probabilities of output and prompt, all in one batch."""
    base = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    params = [
        dataclasses.replace(base, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        dataclasses.replace(base, logprobs=3, prompt_logprobs=2),
        dataclasses.replace(base, temperature=1.0, seed=3, n=3, top_p=0.9),
        dataclasses.replace(base, logit_bias={5: 4.0}, min_tokens=8, stop_token_ids=[5]),
        dataclasses.replace(base, temperature=0.7, seed=4, top_k=5, min_p=0.01),
    ]
    for options in ({}, {"max_num_batched_tokens": 9, "num_kv_blocks": 24}):
        ours, alone = (tiny.run(make(**options), PROMPTS, params) for make in (odd.shared, odd.alone))
        odd.compare(ours, alone)
        for a, b in zip(ours, alone, strict=True):
            assert_logprobs_close(a.prompt_logprobs, b.prompt_logprobs)
            assert_logprobs_close(a.outputs[0].logprobs, b.outputs[0].logprobs)
        assert ours[1].prompt_logprobs is not None


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculation_on_ranks(odd: Pair, method: str) -> None:
    """Drafts are verified by all ranks in one step; who makes them is rank 0's own business."""
    options: dict[str, Any] = {"num_speculative_tokens": 3, "adaptive_draft_length": False}
    if method == "ngram":
        config, draft = SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=3, **options), None
    else:
        config, draft = SpeculativeConfig(model="tiny", **options), odd.network
    prompts = [*PROMPTS, "ab ab ab ab ab ab ab"]
    engine = odd.shared(draft, speculative=config, max_num_batched_tokens=40, num_kv_blocks=40)
    odd.compare(tiny.run(engine, prompts, GREEDY), tiny.run(odd.alone(), prompts, GREEDY))
    stats = engine.stats()
    assert stats.num_draft_tokens > 0
    assert stats.num_accepted_tokens > 0


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMS = [
    StructuredOutput("json_schema", json.dumps(SCHEMA)),
    StructuredOutput("regex", "[0-9]{3}-[a-f]{2,5}(st)?"),
    StructuredOutput("choice", ("the fox", "the dog", "a")),
]


@pytest.mark.parametrize("speculative", [False, True], ids=["", "ngram"])
def test_structured_output_on_ranks(odd: Pair, speculative: bool) -> None:
    """Masks are rank 0's business, on logits gathered from all. Beside a free text, drawn and greedy, with drafts that a
    grammar may refuse."""
    spec = SpeculativeConfig(num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)
    options: dict[str, Any] = {"max_num_batched_tokens": 40} | ({"speculative": spec} if speculative else {})
    base = SamplingParams(temperature=0, max_tokens=40)
    params = [dataclasses.replace(base, structured_output=form) for form in FORMS]
    params += [dataclasses.replace(p, temperature=1.0, seed=7, n=2, min_p=0.02, logprobs=2) for p in params]
    params += [dataclasses.replace(base, ignore_eos=True)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    ours, alone = (tiny.run(make(**options), prompts, params) for make in (odd.shared, odd.alone))
    odd.compare(ours, alone)
    ended = 0
    for p, a, b in zip(params[:-1], ours, alone, strict=False):
        for one, other in zip(a.outputs, b.outputs, strict=True):
            assert one.text == other.text
            assert_logprobs_close(one.logprobs, other.logprobs)
            assert p.structured_output is not None
            if one.finish_reason == "stop":
                ended += 1
                check_form(p.structured_output, one.text)
    assert ended >= 6  # the rest is cut by max_tokens


def check_form(form: StructuredOutput, text: str) -> None:
    if form.kind == "json_schema":
        value = json.loads(text)
        assert value["a"] >= 0 and value["b"] in ("x", "yes")
    elif form.kind == "regex":
        assert re.fullmatch(form.text, text)
    else:
        assert text in form.value


def test_embeddings_on_ranks(odd: Pair) -> None:
    """Beside a request that generates, and in chunks."""
    engines = odd.shared(max_num_batched_tokens=16), odd.alone()
    for pooling in (PoolingParams(pooling="mean"), PoolingParams(pooling="last", normalize=False)):
        ours, alone = (tiny.run(engine, PROMPTS[:3], [pooling, pooling, GREEDY]) for engine in engines)
        for a, b in zip(ours[:2], alone[:2], strict=True):
            assert a.embedding is not None
            assert a.embedding == pytest.approx(b.embedding, abs=1e-5)
        odd.compare(ours[2:], alone[2:])


def assert_logprobs_close(ours: Any, alone: Any) -> None:
    assert (ours is None) == (alone is None)
    for a, b in zip(ours or [], alone or [], strict=True):
        assert (a is None) == (b is None)
        for token in a or {}:
            assert token in b
            assert a[token].rank == b[token].rank
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_memory_plan_counts_what_rank_0_holds(size: int) -> None:
    """To the byte: its weights with rotary tables, and its KV cache; and no other rank has more of either."""
    source = tiny.TinySource(config=MODELS["9-and-3-heads"])
    sizes = PlanOptions("cpu", torch.float32, 256, 16, 64, 8, num_kv_blocks=32, tensor_parallel_size=size)
    plan = memory_plan(source.config, source.tensors(), sizes, 1 << 30, 1 << 30)
    config = EngineConfig(max_model_len=256, num_kv_blocks=32, max_num_seqs=16, max_num_batched_tokens=64, block_size=8)
    cpu = torch.device("cpu")
    weights, kv = [], []
    for rank in range(size):
        model = build_model(source.config, cpu, torch.float32, 256, TensorParallel(rank, size))
        weights.append(sum(4 * w.out.numel() for w in model.weights()) + 4 * model.cos_sin.numel())
        kv.append(Runner(model, config, cpu, torch.float32).kv_memory.nbytes)
    assert plan.weights_total == weights[0] == max(weights)
    assert plan.kv_bytes == kv[0] == max(kv)
    assert plan.num_parameters == sum(w.out.numel() for w in build_meta(source.config, 8).weights())
