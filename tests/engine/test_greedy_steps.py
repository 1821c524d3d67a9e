"""Steps of which only greedy tokens are wanted give tokens and no logits: the same tokens, and only where nothing more is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn import ops
from fastattn.engine import runner as runner_module
from fastattn.engine.config import EngineConfig
from fastattn.engine.decode_shapes import DecodeShape
from fastattn.engine.engine import Engine
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.runner import MOST_GREEDY_ROWS
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.structured_output import StructuredOutput
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader.quantized_source import with_quantization
from fastattn.models.registry import build_meta, build_model, load_model
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import TensorParallel
from fastattn.reference.linear import can_pack
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.requests import GREEDY, PROMPTS, only, with_
from tests.engine.test_tensor_parallel import MODELS, OPTIONS, Pair
from tests.engine.thread_ranks import ThreadRanks

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
TIED = replace(tiny.CONFIG, tie_word_embeddings=True)


@pytest.fixture
def plain_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded from now on keep their weights as they are, as on a GPU, so that their heads can draw."""
    monkeypatch.setattr("fastattn.reference.linear.can_pack", lambda weight: False)


@pytest.fixture
def drawn(plain_heads: None, rows_of_heads: list[int]) -> list[int]:
    """Rows of each call of a head that draws."""
    return rows_of_heads


@pytest.fixture
def with_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a call gives where all steps have logits."""

    def run(call: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(runner_module, "MOST_GREEDY_ROWS", 0)
            return call()

    return run


def load(config: ModelConfig = tiny.CONFIG, dtype: torch.dtype = torch.float32, **options: Any) -> DecoderModel:
    return load_model(tiny.TinySource(config=config), CPU, dtype, 256, **options)


def tokens(engine: Engine, params: Any, prompts: list[str] = PROMPTS) -> list[list[list[int]]]:
    return [[list(c.token_ids) for c in output.outputs] for output in tiny.run(engine, prompts, params)]


def of_all_lengths(base: SamplingParams = GREEDY) -> list[SamplingParams]:
    """So that numbers of rows fall, and graphs are recorded while draws are not known yet."""
    return [with_(base, max_tokens=6 * i + 5) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("config", [tiny.CONFIG, TIED], ids=["head", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "num_kv_blocks": 20},
        {"async_scheduling": True},
        {"padded": True},
        {"padded": True, "async_scheduling": True},
        {"padded": True, "speculative": SpeculativeConfig("ngram", 3)},
    ],
    ids=lambda o: " ".join(map(str, o)) or "plain",
)
def test_tokens_are_the_same(
    tokenizer: Tokenizer,
    drawn: list[int],
    with_logits: Callable[..., Any],
    config: ModelConfig,
    options: dict[str, Any],
) -> None:
    network = load(config)

    def run() -> Any:
        return tokens(tiny.make_engine(network, tokenizer, **options), of_all_lengths())

    expected = with_logits(run)
    assert not drawn
    assert run() == expected
    assert 1 in drawn and max(drawn) > 1
    if "speculative" not in options:
        assert ({2, 4, 8} if "padded" in options else {2, 3}) <= set(drawn)  # as graphs have them


@pytest.mark.parametrize("padded", [False, True])
def test_beside_requests_that_are_drawn(
    tokenizer: Tokenizer, drawn: list[int], with_logits: Callable[..., Any], padded: bool
) -> None:
    """While there is one in a step it has logits; each of the two kinds of step has graphs of its own."""
    network = load()
    params = [with_(p, temperature=0.7, seed=i) if i % 2 else p for i, p in enumerate(of_all_lengths())]

    def run() -> tuple[Engine, Any]:
        engine = tiny.make_engine(network, tokenizer, padded=padded, async_scheduling=True)
        return engine, tokens(engine, params)

    _, expected = with_logits(run)
    engine, found = run()
    assert found == expected
    # Prompts 1 and 3 are drawn, the last one goes on alone.
    assert set(drawn) == {1}
    if padded:
        assert engine.runner.graphs is not None
        shapes = set(engine.runner.graphs._graphs)
        assert shapes == {DecodeShape(n, n, 1) for n in (8, 4, 2)} | {DecodeShape(1, 1, 1, greedy=True)}


_PLAIN = {"max_tokens": 8, "ignore_eos": True}
MORE_WANTED: dict[str, dict[str, Any]] = {
    "a temperature": {"temperature": 0.5, "seed": 3},
    "log-probabilities": {"logprobs": 0},
    "a penalty": {"repetition_penalty": 1.2},
    "a bias": {"logit_bias": {40: 3.0}},
    "no end so far": {"min_tokens": 8, "stop_token_ids": [tiny.EOS]},
    "a form": {"structured_output": StructuredOutput("regex", "[0-9]{20}")},
}


@pytest.mark.parametrize("why", [*MORE_WANTED, "nothing"])
def test_one_request_that_wants_more_gives_all_of_its_steps_logits(
    tokenizer: Tokenizer, drawn: list[int], why: str
) -> None:
    network = load()
    more = {**_PLAIN, "temperature": 0.0, **MORE_WANTED.get(why, {})}
    tokens(tiny.make_engine(network, tokenizer), [SamplingParams(**more), with_(GREEDY, max_tokens=8)], PROMPTS[:2])
    assert bool(drawn) == (why == "nothing")


@pytest.mark.parametrize("count", [MOST_GREEDY_ROWS, MOST_GREEDY_ROWS + 1])
def test_up_to_so_many_rows(tokenizer: Tokenizer, drawn: list[int], count: int) -> None:
    engine = tiny.make_engine(load(), tokenizer, max_num_seqs=64, max_num_batched_tokens=2048)
    tokens(engine, with_(GREEDY, max_tokens=2), ["a"] * count)
    assert drawn == ([count] * 2 if count == MOST_GREEDY_ROWS else [])


def test_drafts_are_verified_by_logits(tokenizer: Tokenizer, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with drafts has more rows than requests."""
    engine = tiny.make_engine(load(), tokenizer, speculative=SpeculativeConfig("ngram", 3))
    steps: list[tuple[bool, bool]] = []
    compute = engine.runner.compute

    def spy(step: Any) -> Any:
        steps.append((step.num_logits > step.num_seqs, step.greedy))
        return compute(step)

    monkeypatch.setattr(engine.runner, "compute", spy)
    tokens(engine, GREEDY, ["the the the the", "0 0 0 0 0 0"])
    assert {greedy for has_drafts, greedy in steps if has_drafts} == {False}
    assert {greedy for has_drafts, greedy in steps if not has_drafts} == {True}


def test_prompts_that_want_log_probabilities_and_embeddings(
    tokenizer: Tokenizer, drawn: list[int], with_logits: Callable[..., Any]
) -> None:
    """Their own logits and states are there beside the tokens."""
    network = load()
    params = [with_(GREEDY, prompt_logprobs=2), PoolingParams(pooling="mean"), GREEDY]

    def run() -> Any:
        outputs = tiny.run(tiny.make_engine(network, tokenizer), PROMPTS[:3], params)
        told = [outputs[0].prompt_logprobs, outputs[1].embedding]
        return told, [list(only(output).token_ids) for output in (outputs[0], outputs[2])]

    expected = with_logits(run)
    assert not drawn
    assert run() == expected
    assert expected[0][0] and expected[0][1] and drawn


@pytest.mark.parametrize("why", ["a softcap", "batch invariance", "a packed head", "nothing"])
@pytest.mark.parametrize("config", [tiny.CONFIG, TIED], ids=["head", "tied"])
def test_heads_that_do_not_draw(
    tokenizer: Tokenizer,
    drawn: list[int],
    monkeypatch: pytest.MonkeyPatch,
    with_logits: Callable[..., Any],
    why: str,
    config: ModelConfig,
) -> None:
    """Their greedy steps give tokens too, of logits that the engine does not see."""
    options: dict[str, Any] = {"batch_invariant": True} if why == "batch invariance" else {}
    if why == "a softcap":
        config = replace(config, final_softcap=2.0)  # so low that it makes equals of large logits
    if why == "a packed head":
        monkeypatch.setattr("fastattn.reference.linear.can_pack", can_pack)
    network = load(config, **options)

    def run() -> Any:
        return tokens(tiny.make_engine(network, tokenizer, padded=True, **options), of_all_lengths())

    found = run()
    assert bool(drawn) == (why == "nothing")
    assert found == with_logits(run)


def test_a_head_in_8_bits_does_not_draw() -> None:
    quantization = with_quantization(tiny.TinySource(), "int8").config.quantization
    meta = build_meta(tiny.CONFIG, 256)
    assert quantization is not None and meta.lm_head is not None
    assert meta._drawing_head is meta.lm_head.weight
    meta.lm_head.quantize([quantization.scheme("model.layers.0.mlp.down_proj")])
    assert meta.lm_head.quantized is not None and meta._drawing_head is None


def test_sixteen_bits(tokenizer: Tokenizer, drawn: list[int], with_logits: Callable[..., Any]) -> None:
    """Logits in bf16 are often equal; the lowest id is the token, as without."""
    network = load(dtype=torch.bfloat16)
    assert network.lm_head is not None
    # Rows in pairs: each logit is there twice.
    network.lm_head.weight[2 : 2 + 2 * 52 : 2] = network.lm_head.weight[3 : 3 + 2 * 52 : 2]

    def run() -> Any:
        engine = tiny.make_engine(network, tokenizer, dtype=torch.bfloat16, padded=True)
        return tokens(engine, of_all_lengths())

    expected = with_logits(run)
    assert run() == expected
    assert drawn
    assert {token % 2 for text in expected for token in text[0] if 2 <= token < 106} == {0}


@pytest.mark.parametrize("padded", [False, True])
def test_a_request_whose_logits_are_not_numbers_ends_alone(
    tokenizer: Tokenizer, drawn: list[int], padded: bool
) -> None:
    network = load()
    expected = tokens(tiny.make_engine(network, tokenizer), GREEDY, PROMPTS[:3])
    drawn.clear()
    seen = {token for i, text in enumerate(expected) for token in tokenizer.encode(PROMPTS[i]) + text[0]}
    bad = min(set(range(2, tiny.CONFIG.vocab_size)) - seen)
    network.embed_tokens.weight[bad] = float("nan")
    prompts: list[Any] = [PROMPTS[0], {"prompt_token_ids": [5, bad, 6]}, PROMPTS[2]]
    engine = tiny.make_engine(network, tokenizer, padded=padded)
    completions = [only(output) for output in tiny.run(engine, prompts, GREEDY)]
    assert [c.finish_reason for c in completions] == ["length", "error", "length"]
    assert completions[1].stop_reason == "the logits are not finite"
    assert [[list(c.token_ids)] for c in (completions[0], completions[2])] == [expected[0], expected[2]]
    assert drawn


@pytest.fixture(params=[("9-and-3-heads", 2), ("9-and-3-heads", 3), ("tied", 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request: pytest.FixtureRequest, plain_heads: None) -> Iterator[Pair]:
    made = Pair(MODELS[request.param[0]], request.param[1])
    yield made
    made.close()


@pytest.mark.parametrize("padded", [False, True])
def test_ranks_draw_from_their_parts(pair: Pair, drawn: list[int], padded: bool) -> None:
    alone = tiny.run(pair.alone(), PROMPTS, GREEDY)
    drawn.clear()
    pair.groups.append(ThreadRanks(pair.source, pair.size, padded))
    config = EngineConfig(**OPTIONS, max_num_batched_tokens=24, max_num_seqs=4)
    pair.compare(tiny.run(pair.groups[-1].start(config), PROMPTS, GREEDY), alone)
    assert drawn and len(drawn) % pair.size == 0  # each of them, in every step


class Recorded:
    """In the place of a group: rank 0, which comes last, is sent what the others sent."""

    def __init__(self) -> None:
        self.sent: dict[int, torch.Tensor] = {}
        self.rank = 0

    def gather(self, output_tensors: Any, input_tensor: torch.Tensor, root: int) -> Any:
        self.sent[self.rank] = input_tensor.clone()
        for rank, out in enumerate(output_tensors):
            out.copy_(self.sent[rank])
        return self

    def wait(self) -> None:
        """It is done."""


@pytest.mark.parametrize("size", [2, 3])
def test_the_best_of_ranks_is_that_of_one(size: int) -> None:
    """Small integers, so that sums are exact: equals on several ranks, the best on any of them, logits below 0, NaN and inf."""
    vocab, k = tiny.CONFIG.vocab_size, tiny.CONFIG.hidden_size
    generator = torch.Generator().manual_seed(size)
    weight = torch.randint(-1, 2, (vocab, k), generator=generator).float()
    weight[70:90] = weight[5:25]  # the second rank's are the first one's
    weight[:, 0], weight[:, 1], weight[104, 1] = 1, 0, 1
    hidden = torch.zeros(9, k)
    best = [5, 9, 24, 60, 106]
    hidden[:5] = weight[best]
    hidden[5, :2] = torch.tensor([-9.0, 1.0])  # the last rank has the best, of all that are negative
    hidden[6, 3], hidden[7], hidden[8, 0] = float("nan"), float("inf"), float("-inf")
    columns = [torch.zeros(9), torch.zeros(9).int(), torch.ones(9), torch.zeros(9)]
    sampling: Any = (*columns, torch.arange(9), torch.arange(9))
    group: Any = Recorded()
    found = None
    for rank in reversed(range(size)):
        group.rank = rank
        model = build_model(tiny.CONFIG, CPU, torch.float32, 8, TensorParallel(rank, size, group))
        assert model.lm_head is not None
        model.lm_head.weight.copy_(weight[model.lm_head.shard.slices])
        found = model.greedy(hidden, sampling)
    expected = ops.sample(hidden @ weight.t(), *sampling).tolist()
    assert expected == [*best, 104, -1, -1, -1]
    assert found is not None and found.tolist() == expected
