"""What a load asks: prompts of given lengths out of nothing, or out of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastattn.models.tokenizer import Tokenizer

# Short common words: with the space before it each is one token in about every vocabulary that was learned from text.
_TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you "
    "were all her she there would their we him been has when who will no more if out so up said what its about than into them "
    "can only other time new some could these two may first then do any like my now over such our man me even most made after "
    "also did many off before must well back through years much where your way down should because long each just state people "
    "those too how little good world make very year still see own work men day get here between both life being under three "
    "never know same last another while us might great old since against go came right used take states himself few house use"
)
_WORDS = _TEXT.split()

# ShareGPT conversations of other lengths are left out, as vLLM does.
_MIN_TOKENS, _MAX_PROMPT, _MAX_TOTAL = 4, 1024, 2048


@dataclass(frozen=True)
class Sample:
    """prompt_len: tokens, as far as they are known before the server has counted them. output_len: tokens to ask for."""

    prompt: str
    prompt_len: int
    output_len: int


@dataclass(frozen=True)
class DatasetOptions:
    """name: "random", "sharegpt" or "custom". input_len, output_len: tokens; None is the dataset's own choice.
    range_ratio: random lengths are drawn from [len × (1 − ratio), len × (1 + ratio)]. prefix_len: tokens that all random
    prompts begin with."""

    name: str = "random"
    path: Path | None = None
    num_prompts: int = 1000
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float = 0.0
    prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ("random", "sharegpt", "custom"):
            raise ValueError(f"dataset-name is {self.name!r}, allowed are 'random', 'sharegpt' and 'custom'")
        if self.name != "random" and self.path is None:
            raise ValueError(f"dataset-name is {self.name!r}, which needs --dataset-path")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"random-range-ratio is {self.range_ratio}, allowed is from 0 to below 1")
        if self.num_prompts < 1:
            raise ValueError(f"num-prompts is {self.num_prompts}, allowed is at least 1")
        if self.prefix_len < 0:
            raise ValueError(f"random-prefix-len is {self.prefix_len}, allowed is at least 0")


def load_samples(options: DatasetOptions, tokenizer: Tokenizer | None = None) -> list[Sample]:
    """The same options and tokenizer give the same samples. Without a tokenizer a word counts as a token.

    Raises ValueError for a file that cannot serve, OSError for one that cannot be read.
    """
    rng = np.random.default_rng(options.seed)
    if options.name == "random":
        return _random(options, rng, tokenizer)
    if options.path is None:
        raise ValueError(f"dataset-name is {options.name!r}, which needs --dataset-path")
    count = _counter(tokenizer)
    found = list(_sharegpt(options, options.path, count) if options.name == "sharegpt" else _custom(options, count))
    if not found:
        raise ValueError(f"{options.path} has no usable prompt")
    order = rng.permutation(len(found)) if options.name == "sharegpt" else range(len(found))
    # A file with fewer prompts is gone through again: the load must be what was asked for.
    return [found[order[i % len(found)]] for i in range(options.num_prompts)]


def _counter(tokenizer: Tokenizer | None) -> Callable[[str], int]:
    return (lambda text: len(text.split())) if tokenizer is None else (lambda text: len(tokenizer.encode(text)))


def _random(options: DatasetOptions, rng: np.random.Generator, tokenizer: Tokenizer | None) -> list[Sample]:
    prefix = _words(rng, options.prefix_len, tokenizer)
    samples = []
    for _ in range(options.num_prompts):
        length, output_len = (
            _length(rng, wish, options.range_ratio) for wish in (options.input_len or 1024, options.output_len or 128)
        )
        samples.append(Sample(prefix + _words(rng, length, tokenizer), options.prefix_len + length, output_len))
    return samples


def _length(rng: np.random.Generator, length: int, ratio: float) -> int:
    low, high = int(length * (1 - ratio)), int(length * (1 + ratio))
    return int(rng.integers(max(low, 1), max(high, 1), endpoint=True))


def _words(rng: np.random.Generator, num_tokens: int, tokenizer: Tokenizer | None) -> str:
    """A text of so many tokens; exact where the tokenizer is known and does not merge across the cut."""
    text = "".join(f" {_WORDS[i]}" for i in rng.integers(0, len(_WORDS), num_tokens))
    if tokenizer is None:
        return text
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:num_tokens])


def _sharegpt(options: DatasetOptions, path: Path, count: Callable[[str], int]) -> Iterator[Sample]:
    """The first question and answer of each conversation."""
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(conversations, list):
        raise ValueError(f"{path} is no list of conversations, as ShareGPT's file is")
    for conversation in conversations:
        turns = conversation.get("conversations") if isinstance(conversation, dict) else None
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        prompt, answer = (str(turn.get("value", "")) for turn in turns[:2])
        prompt_len, output_len = count(prompt), options.output_len or count(answer)
        if (
            min(prompt_len, output_len) < _MIN_TOKENS
            or prompt_len > _MAX_PROMPT
            or prompt_len + output_len > _MAX_TOTAL
        ):
            continue
        yield Sample(prompt, prompt_len, output_len)


def _custom(options: DatasetOptions, count: Callable[[str], int]) -> Iterator[Sample]:
    """Lines of {"prompt": …, "output_tokens": …}; the second is optional."""
    path = options.path
    assert path is not None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            prompt = row["prompt"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: expected JSON such as {{"prompt": "…"}}') from None
        wish = options.output_len or row.get("output_tokens") or 256
        if not isinstance(prompt, str) or not isinstance(wish, int) or wish < 1:
            raise ValueError(f"{path}, line {number}: prompt must be a text, output_tokens a number from 1")
        yield Sample(prompt, count(prompt), wish)
