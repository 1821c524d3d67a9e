"""The `cache:` section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from fastattn.serve.settings import Seconds, Section


class SemanticConfig(Section):
    """Answers to questions that mean the same. No threshold separates those from questions that only look alike, so words
    are compared too (fastattn.serve.cache.semantic).

    encoder: folder of a sentence encoder in sentence-transformers' layout. threshold: least cosine similarity.
    wording: "same" asks for the same words in any order, apart from those that carry no meaning; "similar" leaves words to
    the encoder and compares numbers, names, negations, opposites and what stands on which side. max_candidates: how many of
    the latest questions are compared.
    """

    encoder: Annotated[Path, Field(strict=False)]
    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.95
    wording: Literal["same", "similar"] = "same"
    max_candidates: Annotated[int, Field(ge=1, le=100_000)] = 1000


class CacheConfig(Section):
    """path: the SQLite file; it belongs to one server at a time. ttl: seconds that an answer is kept. max_bytes: of all
    answers; the least recently used go first. max_entry_bytes: longer answers are not kept. cache_sampled: keep answers that
    were drawn at random too. lookup_timeout: seconds after which a lookup counts as a miss. retry_seconds: for how long a
    store that failed is left alone. semantic: off when absent.
    """

    path: Annotated[Path, Field(strict=False)]
    ttl: Seconds = 86_400.0
    max_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 44)] = 256 << 20
    max_entry_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 30)] = 1 << 20
    cache_sampled: bool = False
    lookup_timeout: Seconds = 0.25
    retry_seconds: Seconds = 10.0
    semantic: SemanticConfig | None = None

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.max_entry_bytes > self.max_bytes:
            raise ValueError(
                f"max_entry_bytes is {self.max_entry_bytes}, allowed is at most max_bytes = {self.max_bytes}"
            )
        return self
