"""SmolLM2's greedy tokens are those of Hugging Face transformers in fp32, whatever the schedule."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastattn import LLM, SamplingParams
from fastattn.models.loader import open_model
from fastattn.models.loader.source import ModelSource

NUM_PROMPTS, NUM_TOKENS = 12, 32
WORDS = [
    "the",
    "sea",
    "a",
    "river",
    "of",
    "stone",
    "and",
    "light",
    "under",
    "old",
    "trees",
    "where",
    "birds",
    "sing",
    "because",
    "rain",
    "falls",
    "on",
    "quiet",
    "roads",
]


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_model("smollm2")


@pytest.fixture(scope="module")
def prompts(source: ModelSource) -> list[list[int]]:
    rng = random.Random(0)
    tokenizer = source.tokenizer()
    shared = " ".join(rng.choices(WORDS, k=40))  # half of the prompts begin alike, for the prefix cache
    texts = [
        (shared if i % 2 else "") + " ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for i in range(NUM_PROMPTS)
    ]
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def expected(source: ModelSource, prompts: list[list[int]]) -> list[list[int]]:
    c = source.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_theta=c.rope.theta,
        tie_word_embeddings=c.tie_word_embeddings,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        source.read(name, parameter.data)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


SCHEDULES = {
    "batched": {},
    "chunked prefill": {"max_num_batched_tokens": 16},
    "three at a time": {"max_num_seqs": 3},
    "preempted": {"num_kv_blocks": 24},
    "no prefix cache": {"enable_prefix_caching": False},
    "mixed": {"max_num_batched_tokens": 24, "num_kv_blocks": 30, "max_num_seqs": 5},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_equal_transformers(schedule: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    llm = LLM("smollm2", device="cpu", dtype="float32", max_model_len=256, quiet=True, **SCHEDULES[schedule])
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for _ in range(2 if schedule == "batched" else 1):  # the second time from the prefix cache
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == expected


def test_a_prompt_that_cannot_fit_is_refused_and_the_engine_lives_on(prompts: list[list[int]]) -> None:
    llm = LLM("smollm2", device="cpu", dtype="float32", max_model_len=64, quiet=True)
    with pytest.raises(ValueError, match="64"):
        llm.generate([{"prompt_token_ids": [5] * 100}], SamplingParams(max_tokens=4), use_tqdm=False)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    assert llm.generate([{"prompt_token_ids": [5] * 10}], params, use_tqdm=False)[0].finished


def test_streamed_pieces_make_up_the_text() -> None:
    llm = LLM("smollm2", device="cpu", dtype="float32", max_model_len=128, quiet=True)
    params = SamplingParams(temperature=0.0, max_tokens=24)
    whole = [o.outputs[0].text for o in llm.generate(["The sea is", "Ünïcödé 🦊"], params, use_tqdm=False)]

    def texts() -> Iterator[tuple[str, str]]:
        for output in llm.stream(["The sea is", "Ünïcödé 🦊"], params):
            yield output.request_id, output.outputs[0].text

    pieces: dict[str, str] = {}
    for request_id, text in texts():
        pieces[request_id] = pieces.get(request_id, "") + text
    assert sorted(pieces.values()) == sorted(whole)
