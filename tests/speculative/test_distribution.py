"""What is sampled under speculation is distributed as the model says: chi-square over 20,000 completions of an engine."""

from __future__ import annotations

import pytest
import torch

from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import DraftSampleMethod, SpeculativeConfig
from tests.engine.tiny import full_logits, make_engine, run

pytestmark = pytest.mark.usefixtures("one_thread")

TOP_K, DRAWS, N = 5, 20_000, 250
PROMPT = [2, 40, 41, 40, 41, 7]


def next_tokens(network: DecoderModel, tokens: list[int]) -> dict[int, float]:
    """The TOP_K likeliest tokens and their probabilities among themselves, in fp64."""
    values, ids = full_logits(network, tokens)[-1].double().topk(TOP_K)
    return dict(zip(ids.tolist(), values.softmax(0).tolist(), strict=True))


def exact(network: DecoderModel) -> dict[tuple[int, ...], float]:
    """The probability of each continuation of three tokens."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        found = {
            (*tokens, token): p * q
            for tokens, p in found.items()
            for token, q in next_tokens(network, PROMPT + list(tokens)).items()
        }
    return found


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_chi_square(network: DecoderModel, near: DecoderModel, tokenizer: Tokenizer, method: DraftSampleMethod) -> None:
    """The first token comes with the prompt, the two after it are guessed by a model that is right now and then."""
    spec = SpeculativeConfig(
        model="near", num_speculative_tokens=2, draft_sample_method=method, adaptive_draft_length=False
    )
    engine = make_engine(
        network,
        tokenizer,
        draft=near,
        speculative=spec,
        max_num_seqs=N,
        max_num_batched_tokens=4 * N,
        num_kv_blocks=3 * N,
        debug_checks=False,
    )
    params = SamplingParams(temperature=1, top_k=TOP_K, n=N, max_tokens=4, ignore_eos=True, output_kind="final")
    outputs = run(engine, [{"prompt_token_ids": PROMPT}] * (DRAWS // N), params)
    drawn = [tuple(c.token_ids[:3]) for output in outputs for c in output.outputs]
    stats = engine.stats()
    assert 0.05 < stats.num_accepted_tokens / stats.num_draft_tokens < 0.95

    probabilities = exact(network)
    assert set(drawn) <= probabilities.keys()
    index = {tokens: i for i, tokens in enumerate(probabilities)}
    counts = torch.bincount(torch.tensor([index[tokens] for tokens in drawn]), minlength=len(index)).double()
    expected = torch.tensor(list(probabilities.values()), dtype=torch.float64) * len(drawn)
    # Rare ones together, so that chi-square holds.
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic, freedom = float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom > 50
    # Wilson and Hilferty: (x / k)^(1/3) is nearly normal; 4.75 sigma is one in a million.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4.75, (statistic, freedom)
