"""Tokenizers out of GGUF metadata: the text comes back, special tokens are what they say, and incomplete metadata is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers.pre_tokenizers import ByteLevel

from fastattn.models.loader.gguf_tokenizer import tokenizer_from_gguf
from fastattn.models.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

BYTE_LEVEL_TOKENS = [*sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello", "12", "<|start|>", "<|end|>"]
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": BYTE_LEVEL_TOKENS,
    "tokenizer.ggml.token_type": np.array([NORMAL] * (len(BYTE_LEVEL_TOKENS) - 2) + [CONTROL] * 2),
    "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "1 2"],
    "tokenizer.ggml.bos_token_id": len(BYTE_LEVEL_TOKENS) - 2,
    "tokenizer.ggml.eos_token_id": len(BYTE_LEVEL_TOKENS) - 1,
}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *"▁helo", "he", "ll", "▁he", "▁▁"]
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES_TOKENS,
    # Pairs that come earlier in the vocabulary are merged first.
    "tokenizer.ggml.scores": -np.arange(len(PIECES_TOKENS), dtype=np.float32),
    "tokenizer.ggml.token_type": np.array([CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256 + [NORMAL] * 8 + [USER_DEFINED]),
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.add_space_prefix": False,
}
KINDS = {"gpt2": BYTE_LEVEL, "llama": PIECES}


def made(base: dict[str, Any], **changes: Any) -> Tokenizer:
    """``changes``: keys without their prefix; None takes one away."""
    entries = {
        **base,
        **{f"tokenizer.{key}" if "." in key else f"tokenizer.ggml.{key}": v for key, v in changes.items()},
    }
    return tokenizer_from_gguf({key: value for key, value in entries.items() if value is not None})


def ids(base: dict[str, Any], *tokens: str) -> list[int]:
    return [base["tokenizer.ggml.tokens"].index(token) for token in tokens]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_every_text_comes_back(kind: str, text: str) -> None:
    tokenizer = made(KINDS[kind])
    text = text.replace("▁", "_")  # SentencePiece's own sign for a space
    text = text.encode("utf-8", "replace").decode()
    encoded = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert tokenizer.decode(encoded, skip_special_tokens=False) == text
    stream = tokenizer.stream(skip_special_tokens=False)
    assert text.startswith("".join(piece for token in encoded if (piece := stream.step(token))))


def test_merges_apply_in_their_order() -> None:
    assert made(BYTE_LEVEL).encode("hello") == ids(BYTE_LEVEL, "hello")
    assert made(BYTE_LEVEL, merges=["l l", "h e"]).encode("hello") == ids(BYTE_LEVEL, "he", "ll", "o")


def test_smollm_cuts_digits_and_qwen_does_not_reach_across_them() -> None:
    assert made(BYTE_LEVEL).encode("12") == ids(BYTE_LEVEL, "1", "2")
    assert made(BYTE_LEVEL, pre="gpt-2").encode("12") == ids(BYTE_LEVEL, "12")
    assert made(BYTE_LEVEL, pre="qwen2").encode("12") == ids(BYTE_LEVEL, "1", "2")
    assert made(BYTE_LEVEL, pre="llama-bpe").encode("12") == ids(BYTE_LEVEL, "12")


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        # Without contractions of their own, words that end before a capital, a digit at a time, slashes behind signs.
        ("tekken", "I don't stop in 2024", ["I", " don", "'t", " stop", " in", " ", "2", "0", "2", "4"]),
        ("tekken", "HTTPServer helloWorld", ["HTTPServer", " hello", "World"]),
        ("tekken", "ÄRGER über//\n", ["ÄRGER", " über", "//\n"]),
        ("llama-v3", "I don't stop in 2024", ["I", " don", "'t", " stop", " in", " ", "202", "4"]),
        ("llama-v3", "helloWorld//\n", ["helloWorld", "//\n"]),
        ("deepseek-r1-qwen", "don't 24", ["don", "'t", " ", "2", "4"]),
    ],
)
def test_text_is_cut_before_it_is_merged(pre: str, text: str, pieces: list[str]) -> None:
    pipeline = Pipeline.from_str(made(BYTE_LEVEL, pre=pre).parts()["pipeline"])
    cut = pipeline.pre_tokenizer.pre_tokenize_str(text)
    assert [text[first:end] for _, (first, end) in cut] == pieces


def test_tekken_takes_a_whole_word() -> None:
    assert made(BYTE_LEVEL, pre="tekken", merges=["l l"]).encode("hello") == ids(BYTE_LEVEL, "hello")


def test_llama3_takes_a_whole_word_that_no_merge_reaches() -> None:
    changes = {"merges": ["h e"]}
    assert made(BYTE_LEVEL, pre="llama-bpe", **changes).encode("hello") == ids(BYTE_LEVEL, "hello")
    assert made(BYTE_LEVEL, pre="gpt-2", **changes).encode("hello") == ids(BYTE_LEVEL, "he", "l", "l", "o")


def test_scores_decide_what_merges_first() -> None:
    plain = made(PIECES, add_bos_token=False)
    assert plain.encode("hello") == ids(PIECES, "he", "ll", "o")
    assert plain.encode(" hello") == ids(PIECES, "▁he", "ll", "o")
    tokens = [*PIECES_TOKENS[:-4], "he", "el", "ll", "▁▁"]
    other = made(PIECES, tokens=tokens, add_bos_token=False)
    assert other.encode("hel") == [tokens.index("he"), tokens.index("l")]
    scores = PIECES["tokenizer.ggml.scores"].copy()
    scores[tokens.index("el")] = 1.0
    assert made(PIECES, tokens=tokens, scores=scores, add_bos_token=False).encode("hel") == [
        tokens.index("h"),
        tokens.index("el"),
    ]


def test_what_no_piece_covers_becomes_bytes() -> None:
    tokenizer = made(PIECES, add_bos_token=False)
    assert tokenizer.encode("é") == ids(PIECES, "<0xC3>", "<0xA9>")
    assert tokenizer.decode(ids(PIECES, "<0xC3>", "<0xA9>")) == "é"


def test_runs_of_spaces_are_user_defined_pieces() -> None:
    assert made(PIECES, add_bos_token=False).encode("h  h") == ids(PIECES, "h", "▁▁", "h")


def test_space_prefix() -> None:
    with_prefix = made(PIECES, add_space_prefix=True, add_bos_token=False)
    assert with_prefix.encode("he") == ids(PIECES, "▁he")
    assert with_prefix.decode(with_prefix.encode("he")) == "he"
    assert made(PIECES, add_bos_token=False).encode("he") == ids(PIECES, "he")


def test_bos_and_eos() -> None:
    assert made(PIECES).encode("h") == ids(PIECES, "<bos>", "h")
    assert made(PIECES, add_bos_token=False).encode("h") == ids(PIECES, "h")
    assert made(PIECES, add_eos_token=True).encode("h") == ids(PIECES, "<bos>", "h", "<eos>")
    assert made(BYTE_LEVEL).encode("h") == ids(BYTE_LEVEL, "h")
    assert made(BYTE_LEVEL, add_bos_token=True).encode("h") == ids(BYTE_LEVEL, "<|start|>", "h")
    assert made(PIECES).encode("h", add_special_tokens=False) == ids(PIECES, "h")
    assert made(BYTE_LEVEL, eot_token_id=5).eos_token_ids == (len(BYTE_LEVEL_TOKENS) - 1, 5)


def test_special_tokens_of_a_stranger_stay_text() -> None:
    tokenizer = made(BYTE_LEVEL)
    assert tokenizer.encode("<|end|>") == ids(BYTE_LEVEL, "<|end|>")
    as_text = tokenizer.encode("<|end|>", parse_special=False)
    assert len(as_text) == len("<|end|>") and tokenizer.decode(as_text) == "<|end|>"
    assert tokenizer.encode("<|end|>") == ids(BYTE_LEVEL, "<|end|>")  # the switch does not stick
    assert tokenizer.decode(ids(BYTE_LEVEL, "hello", "<|end|>")) == "hello"
    assert tokenizer.decode(ids(BYTE_LEVEL, "hello", "<|end|>"), skip_special_tokens=False) == "hello<|end|>"


def test_a_lone_surrogate_is_no_text() -> None:
    assert made(BYTE_LEVEL).decode(made(BYTE_LEVEL).encode("a\ud800b")) == "a?b"
    with pytest.raises(TypeError, match="text is a bytes, expected a string"):
        made(BYTE_LEVEL).encode(b"a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("gpt2", {"model": "bert"}, r"tokenizer\.ggml\.model is 'bert', supported are 'gpt2' and 'llama'"),
        ("gpt2", {"model": None}, r"tokenizer\.ggml\.model is None"),
        ("gpt2", {"tokens": None}, r"tokens is missing"),
        ("gpt2", {"tokens": []}, r"tokens is missing or not a list of strings"),
        ("gpt2", {"tokens": [1, 2]}, r"tokens is missing or not a list of strings"),
        ("gpt2", {"tokens": ["a", "a"], "merges": None, "token_type": None}, r"has the same token twice"),
        ("gpt2", {"pre": "jais"}, r"pre is 'jais', supported are deepseek-r1-qwen, gpt-2, llama-bpe, "),
        ("gpt2", {"pre": 7}, r"pre is 7, supported are"),
        ("gpt2", {"merges": ["ab"]}, r"merges has 'ab', expected two tokens"),
        ("gpt2", {"merges": "h e"}, r"merges is 'h e', expected a list"),
        ("gpt2", {"merges": ["h x"]}, r"merges does not fit the tokens"),
        ("gpt2", {"token_type": np.array([1, 2])}, r"token_type is not as long as the \d+ tokens"),
        ("gpt2", {"eos_token_id": 10**6}, r"eos_token_id is 1000000, allowed is 0 to \d+"),
        ("gpt2", {"bos_token_id": -1}, r"bos_token_id is -1"),
        ("gpt2", {"eot_token_id": "x"}, r"eot_token_id is 'x'"),
        ("gpt2", {"chat_template": None}, None),
        ("llama", {"scores": None}, r"scores is missing"),
        ("llama", {"scores": np.zeros(3, np.float32)}, r"scores is missing or not as long as the \d+ tokens"),
        ("llama", {"unknown_token_id": 10**6}, r"unknown_token_id is 1000000, allowed is 0 to \d+"),
    ],
)
def test_incomplete_metadata_is_named(kind: str, changes: dict[str, Any], says: str | None) -> None:
    if says is None:
        assert not made(KINDS[kind], **changes).has_chat_template
        return
    with pytest.raises(ValueError, match=says):
        made(KINDS[kind], **changes)
