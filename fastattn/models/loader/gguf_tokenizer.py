"""The tokenizer that a GGUF file describes, as a `tokenizers` pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Pipeline
from tokenizers.models import BPE

from fastattn.models.tokenizer import Tokenizer

# Token types of the format.
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# Mistral's, as its tekken.json has it: words end before a capital, digits come alone.
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


# tokenizer.ggml.pre → how text is cut before byte-pair merging.
_PRE_TOKENIZERS = {
    "gpt-2": lambda: _byte_level(use_regex=True),
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: _byte_level(_split(_LLAMA3), use_regex=False),
    "llama3": lambda: _byte_level(_split(_LLAMA3), use_regex=False),
    "llama-v3": lambda: _byte_level(_split(_LLAMA3), use_regex=False),
    "qwen2": lambda: _byte_level(_split(_QWEN2), use_regex=False),
    "deepseek-r1-qwen": lambda: _byte_level(_split(_QWEN2), use_regex=False),
    "tekken": lambda: _byte_level(_split(_TEKKEN), use_regex=False),
}
# A whole word that is in the vocabulary is taken as it is, even where merging would not reach it.
_TAKES_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises ValueError for metadata that is incomplete or describes a tokenizer that we do not know."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ValueError("metadata tokenizer.ggml.tokens is missing or not a list of strings")
    if kind == "gpt2":
        pipeline = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        pipeline = _sentencepiece_bpe(metadata, tokens)
    else:
        raise ValueError(f"metadata tokenizer.ggml.model is {kind!r}, supported are 'gpt2' and 'llama'")
    _add_special_tokens(pipeline, tokens, metadata.get("tokenizer.ggml.token_type"))

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (not isinstance(value, int) or not 0 <= value < len(tokens)):
            raise ValueError(f"metadata tokenizer.ggml.{name}_token_id is {value!r}, allowed is 0 to {len(tokens) - 1}")
        return value

    template = metadata.get("tokenizer.chat_template")
    bos, eos = token_id("bos"), token_id("eos")
    return Tokenizer(
        pipeline,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(t for t in (eos, token_id("eot")) if t is not None)),
        # SentencePiece models begin with a BOS unless they say otherwise, byte-level ones do not.
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Pipeline:
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise ValueError(f"metadata tokenizer.ggml.pre is {name!r}, supported are {', '.join(sorted(_PRE_TOKENIZERS))}")
    stored, merges = metadata.get("tokenizer.ggml.merges", []), []
    if not isinstance(stored, list):
        raise ValueError(f"metadata tokenizer.ggml.merges is {stored!r}, expected a list of strings")
    for merge in stored:
        left, space, right = merge.partition(" ")
        if not space:
            raise ValueError(f"metadata tokenizer.ggml.merges has {merge!r}, expected two tokens")
        merges.append((left, right))
    pipeline = Pipeline(_bpe(_vocabulary(tokens), merges, ignore_merges=name in _TAKES_WORDS))
    if name == "qwen2":
        pipeline.normalizer = normalizers.NFC()
    pipeline.pre_tokenizer = _PRE_TOKENIZERS[name]()
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: list[str]) -> Pipeline:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ValueError(f"metadata tokenizer.ggml.scores is missing or not as long as the {len(tokens)} tokens")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ValueError(f"metadata tokenizer.ggml.unknown_token_id is {unknown!r}, allowed is 0 to {len(tokens) - 1}")
    vocabulary = _vocabulary(tokens)
    merges = _merges_from_scores(vocabulary, scores.tolist())
    pipeline = Pipeline(_bpe(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    underline = normalizers.Replace(" ", "▁")
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), underline]) if prefix else underline
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return pipeline


def _merges_from_scores(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece stores a score per token instead of a list of merges: a better token is merged earlier. Every way to
    put a token together from two others is a merge at that token's place."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("metadata tokenizer.ggml.tokens has the same token twice")
    return vocabulary


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocabulary, merges, **options)
    except Exception as error:  # tokenizers raises plain Exception for a merge outside the vocabulary
        raise ValueError(f"metadata tokenizer.ggml.merges does not fit the tokens ({error})") from None


def _add_special_tokens(pipeline: Pipeline, tokens: list[str], types: Any) -> None:
    if types is None:
        return
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ValueError(f"metadata tokenizer.ggml.token_type is not as long as the {len(tokens)} tokens")
    special, plain = [], []
    for index in np.flatnonzero((types == _CONTROL) | (types == _USER_DEFINED)).tolist():
        token = tokens[index]
        if not token:
            continue
        if types[index] == _CONTROL:
            special.append(AddedToken(token, special=True, normalized=False))
        else:
            # Runs of spaces are stored as they look after normalization, so that is where they must be found.
            plain.append(AddedToken(token, special=False, normalized="▁" in token))
    pipeline.add_special_tokens(special)
    pipeline.add_tokens(plain)
