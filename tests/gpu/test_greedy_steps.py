"""On a GPU greedy steps that give tokens give those of steps that give logits, one by one and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fastattn import LLM, SamplingParams
from fastattn.engine import runner as runner_module
from fastattn.models.loader import ModelFileError, open_model
from tests.engine.tiny import CONFIG, TinySource

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
# A head of its own, whose sizes the kernel that draws takes.
SMALL = replace(
    CONFIG, vocab_size=6000, hidden_size=256, intermediate_size=512, num_heads=4, num_kv_heads=2, head_dim=64
)
MODES: list[dict[str, Any]] = [{}, {"async_scheduling": False}, {"use_cuda_graphs": False}]


@pytest.fixture(scope="module", params=MODES, ids=lambda o: " ".join(o) or "graphs")
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = request.param
    return chosen


@pytest.fixture(scope="module", params=["smollm2", "small", "softcap"])
def llm(request: pytest.FixtureRequest, options: dict[str, Any]) -> Iterator[LLM]:
    """SmolLM2's layers are one kernel with its head for up to four sequences; logits with a softcap are not drawn from."""
    try:
        source: Any = open_model("smollm2") if request.param == "smollm2" else None
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    if source is None:
        softcap = 30.0 if request.param == "softcap" else 0.0
        source = TinySource(config=replace(SMALL, final_softcap=softcap))
    sizes = {"max_model_len": 512, "num_kv_blocks": 2048, "max_num_seqs": 48, "enable_prefix_caching": False}
    made = LLM(source, device="cuda", dtype="bfloat16", quiet=True, **sizes, **options)
    yield made
    made.close()


@pytest.mark.parametrize("count", [1, 3, 11, 32, 33])
def test_tokens_are_the_same(llm: LLM, monkeypatch: pytest.MonkeyPatch, rows_of_heads: list[int], count: int) -> None:
    """Requests of all lengths, so that numbers of rows fall; every fourth of eleven draws at random, so that both kinds of steps
    take turns."""
    prompts = [{"prompt_token_ids": [2 + (i * 7 + j) % 100 for j in range(5 + i)]} for i in range(count)]
    params = [
        SamplingParams(
            temperature=0.8 if count == 11 and i % 4 == 3 else 0.0, seed=i, max_tokens=4 + 2 * i, ignore_eos=True
        )
        for i in range(count)
    ]

    def run() -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "MOST_GREEDY_ROWS", 0)
        expected = run()
    assert not rows_of_heads
    found = run()
    assert found == expected
    runner = llm.engine.runner
    if count not in (11, 33):  # the first token is of a step without a graph, whose rows are all greedy and few
        assert bool(rows_of_heads) == (runner.model._drawing_head is not None)
    assert run() == expected  # all graphs are there now
    if runner.graphs is not None:
        assert {shape.greedy for shape in runner.graphs._graphs} == {False, True}
