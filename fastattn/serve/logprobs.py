"""Log-probabilities in the two shapes that OpenAI's API has for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattn.serve.messages import TokenLogprob

_LOWEST = -9999.0  # JSON has no infinity, and this is what OpenAI writes for a token that could not be chosen


def chat_logprobs(rows: Sequence[Sequence[TokenLogprob]], num_top: int) -> dict[str, Any]:
    """Each row: the chosen token first. It is among the ``num_top`` likeliest only if its rank says so."""
    content = []
    for row in rows:
        likeliest = sorted((token for token in row if token.rank <= num_top), key=lambda token: token.rank)
        content.append({**_token(row[0]), "top_logprobs": [_token(token) for token in likeliest]})
    return {"content": content, "refusal": None}


def text_logprobs(rows: Sequence[Sequence[TokenLogprob]], num_top: int, offset: int) -> tuple[dict[str, Any], int]:
    """OpenAI's older shape, four lists side by side; and where the next token begins. The first token of a prompt (rank 0)
    has no probability."""
    tokens, logprobs, offsets = [], [], []
    top: list[dict[str, float] | None] = []
    for row in rows:
        offsets.append(offset)
        tokens.append(row[0].text)
        logprobs.append(_finite(row[0].logprob) if row[0].rank else None)
        top.append({token.text: _finite(token.logprob) for token in row} if num_top and row[0].rank else None)
        offset += len(row[0].text)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}, offset


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}


def _finite(value: float) -> float:
    return value if value > _LOWEST else _LOWEST
