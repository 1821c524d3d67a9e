"""Text to calibrate on, to learn from and to be judged by.

The default is on every machine: the topics of Python's own `help()`, half a million characters of technical English that come
with the interpreter (`pydoc_data.topics`). Every fifth topic is kept apart for evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastattn.models.tokenizer import Tokenizer

Part = Literal["calibration", "evaluation"]
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Corpus:
    """name: what a receipt calls it. documents: texts that have nothing to do with each other."""

    name: str
    documents: tuple[str, ...]

    @property
    def digest(self) -> str:
        found = hashlib.sha256()
        for document in self.documents:
            found.update(hashlib.sha256(document.encode("utf-8", "replace")).digest())
        return f"sha256:{found.hexdigest()}"


def load_corpus(files: Sequence[str | Path], part: Part) -> Corpus:
    """The files, each a document in UTF-8; if there are none, the built-in text's ``part``. Raises ValueError, OSError."""
    if not files:
        return _builtin(part)
    documents = []
    for path in map(Path, files):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 at byte {error.start}") from None
        if not text.strip():
            raise ValueError(f"{path}: holds no text")
        documents.append(text)
    return Corpus(", ".join(Path(path).name for path in files), tuple(documents))


def _builtin(part: Part) -> Corpus:
    from pydoc_data.topics import topics

    held_out = part == "evaluation"
    names = [name for i, name in enumerate(sorted(topics)) if (i % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == held_out]
    which = "every fifth topic" if held_out else "all but every fifth topic"
    return Corpus(f"pydoc_data.topics ({which})", tuple(topics[name] for name in names))


def token_windows(corpus: Corpus, tokenizer: Tokenizer, length: int, count: int | None = None) -> torch.Tensor:
    """(n, length) int64: the documents' tokens end to end, cut into windows; where the model wants a BOS each has its own.

    count: that many, evenly spread over the text; None or more than there are: all. Raises ValueError if there is not one.
    """
    if length < 2:
        raise ValueError(f"length is {length}, allowed is from 2")
    if count is not None and count < 1:
        raise ValueError(f"count is {count}, allowed is from 1")
    first = [tokenizer.bos_token_id] if tokenizer.parts()["add_bos"] else []
    ids: list[int] = []
    for document in corpus.documents:
        ids += tokenizer.encode(document, add_special_tokens=False, parse_special=False)
    step = length - len(first)
    available = len(ids) // step
    if available < 1:
        raise ValueError(f"{corpus.name}: has {len(ids)} tokens, expected at least a window of {length}")
    wanted = available if count is None else min(count, available)
    starts = [i * available // wanted * step for i in range(wanted)]
    return torch.tensor([first + ids[start : start + step] for start in starts])
