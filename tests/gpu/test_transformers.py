"""SmolLM2 in transformers on a GPU, in 16 bits: attn_implementation="fastattn" writes the text that sdpa writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers comes with fastattn[compress]")
import fastattn.integrations.transformers  # noqa: F401 - registers the name
from fastattn.models.loader import ModelFileError, open_model
from tests.engine.exact import hf_model

pytestmark = pytest.mark.gpu
PROMPTS = (
    "The capital of France is",
    "Plants turn light and water into",
    "def fibonacci(n):",
    "Once upon a time, in a village at the edge of the forest, there lived an old clockmaker who",
    "The three most common causes of forest fires are",
    "Dear Sir or Madam,",
    "In 1969, the first people who walked on the Moon",
    "A recipe for bread needs flour, water, salt and",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    try:
        source = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had here: {error}")
    return hf_model(source).to(torch.bfloat16).to("cuda"), source.tokenizer()


def logits(model: Any, ids: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        result: Tensor = model.to(dtype)(input_ids=ids).logits[0].float()
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_greedy_text_and_logits(smollm2: tuple[Any, Any], dtype: torch.dtype) -> None:
    """A padded batch. Texts may part where two tokens are as near to each other as sdpa's own rounding moves logits
    there; along each text our logits err at most twice as far as sdpa's."""
    model, tokenizer = smollm2
    rows = [tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device="cuda")
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device="cuda")
    texts = {}
    for implementation in ("sdpa", "fastattn"):
        model.to(dtype).set_attn_implementation(implementation)
        batch = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        texts[implementation] = batch[:, longest:].tolist()
    parted = []
    for row, theirs, ours in zip(rows, texts["sdpa"], texts["fastattn"], strict=True):
        known = torch.tensor([row + theirs], device="cuda")
        exact = logits(model, known, "sdpa", torch.float32)
        error = (logits(model, known, "sdpa", dtype) - exact).abs()
        own_error = (logits(model, known, "fastattn", dtype) - exact).abs()
        assert float(own_error.max()) <= 2 * float(error.max())
        if theirs != ours:
            place = next(i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)
            at = len(row) + place - 1
            gap = float((exact[at, theirs[place]] - exact[at, ours[place]]).abs())
            parted.append((place, gap))
            assert gap <= 2 * float(error[at].max()), f"no near tie: {gap:.3f} nats at token {place}"
    print(
        f"{len(rows) - len(parted)} of {len(rows)} texts are the same in {dtype}; others part at (token, nats): {parted}"
    )
    assert len(parted) <= len(rows) // 2
