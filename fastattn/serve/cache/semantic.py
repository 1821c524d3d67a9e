"""When two questions may share an answer. Vectors alone cannot tell: to MiniLM "safe" and "not safe" are 0.994 alike, 100 and
1000 dollars 0.929, a paraphrase 0.945. So two questions must also say the same of what vectors blur."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from fastattn.serve.cache.config import SemanticConfig
from fastattn.serve.cache.database import Question
from fastattn.serve.cache.key import canonical_hash, fields_of
from fastattn.serve.cache.words import (
    FILLERS,
    NEGATIONS,
    NUMBER_WORDS,
    OPENING,
    OPPOSITES,
    ORDER_WORDS,
    UNITS,
    stem,
)

if TYPE_CHECKING:
    from fastattn.serve.cache.encoder import Encoder
    from fastattn.serve.contract import RequestContext
    from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

_MAX_CHARS = 2000  # longer questions differ in ways that one vector does not hold
# A number with its sign, or a word with its inner apostrophes, hyphens and dots (C++, node.js), or one other sign.
_TOKEN = re.compile(r"[-+]?\d[\d.,:/]*\d|[-+]?\d|[^\W\d_][\w'’+#.-]*[\w+#]|[^\W_]|[^\w\s]")
_QUESTION_PLACE = "\0"


class Signature(msgspec.Struct, frozen=True):
    """What must be equal on both sides. numbers: in order, with their units. names: capitalized, mixed or quoted words, in
    order. negations, opposites (before, off, to, …) and words (all that carry meaning): in order. shape: signs that change
    meaning (code, formulas)."""

    numbers: list[str]
    names: list[str]
    negations: list[str]
    opposites: list[str]
    words: list[str]
    shape: list[str]


@dataclass(frozen=True)
class Asked:
    question: Question
    signature: Signature
    vector: np.ndarray[tuple[int], np.dtype[np.float32]]  # (dimension,)


class SemanticLookup:
    def __init__(self, config: SemanticConfig, encoder: Encoder) -> None:
        self._config, self._encoder = config, encoder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastattn-encoder")

    async def ask(
        self, request: ChatCompletionRequest | CompletionRequest, fingerprint: str, context: RequestContext
    ) -> Asked | None:
        """The question of a request; None where a similar one's answer will not do."""
        text = question_of(request)
        if text is None:
            return None
        fields = fields_of(request)
        fields["messages"][-1]["content"] = _QUESTION_PLACE
        rest = ("semantic", type(request).__name__, fields, fingerprint, context.tenant, dict(context.request_headers))
        partition = canonical_hash(*rest)
        signature = signature_of(text)
        loop = asyncio.get_running_loop()
        (vector,) = await loop.run_in_executor(self._thread, self._encoder.encode, [text])
        vector = np.ascontiguousarray(vector, dtype=np.float32)
        question = Question(partition, msgspec.msgpack.encode(signature), vector.tobytes())
        return Asked(question, signature, vector)

    def best(self, asked: Asked, known: list[tuple[bytes, Question]]) -> tuple[bytes, float] | None:
        """(key, score) of the most similar question that says the same."""
        best: tuple[bytes, float] | None = None
        for key, question in known:
            vector = np.frombuffer(question.vector, dtype=np.float32)
            if vector.shape != asked.vector.shape:  # of another encoder
                continue
            score = float(vector @ asked.vector)
            if score < self._config.threshold or (best is not None and score <= best[1]):
                continue
            signature = msgspec.msgpack.decode(question.signature, type=Signature)
            if agree(signature, asked.signature, self._config.wording):
                best = key, min(score, 1.0)
        return best

    def close(self) -> None:
        self._thread.shutdown()


def question_of(request: ChatCompletionRequest | CompletionRequest) -> str | None:
    """The last message of a chat at temperature 0, one answer, no tools and no structure asked for, nothing but text."""
    messages = getattr(request, "messages", None)
    if not messages or request.temperature != 0 or (request.n or 1) != 1 or request.structure is not None:
        return None
    structured = request.response_format is not None and request.response_format.type != "text"
    if structured or getattr(request, "tools", None) or any(m.role == "tool" or m.tool_calls for m in messages):
        return None
    last = messages[-1]
    if last.role != "user" or not isinstance(last.content, str) or not 0 < len(last.content) <= _MAX_CHARS:
        return None
    return last.content


def signature_of(text: str) -> Signature:
    text = OPENING.sub("", unicodedata.normalize("NFKC", text).replace("’", "'"))
    numbers: list[str] = []
    names: list[str] = []
    opposites: list[str] = []
    words: list[str] = []
    shape: list[str] = []
    negations: list[str] = []
    starts_sentence, unit_at = True, -1
    tokens = _TOKEN.findall(text)
    for i, word in enumerate(tokens):
        low = word.lower().rstrip(".")
        if (word[-1].isdigit() and word.lstrip("+-")[0].isdigit()) or low in NUMBER_WORDS:
            following = tokens[i + 1].lower() if i + 1 < len(tokens) else ""
            before = tokens[i - 1] if i else ""
            unit = UNITS.get(following) or (before if before in "$€£¥" else "")
            unit_at = i + 1 if following in UNITS else -1
            numbers.append(f"{NUMBER_WORDS.get(low, low)} {unit}".strip())
        elif i == unit_at:
            pass  # it is with its number
        elif not word[0].isalnum():
            if word in "+-*/=<>^%&|~\\{}[]@#$€£¥":
                shape.append(word)
            starts_sentence = starts_sentence or word in ".!?:\n"
            continue
        elif low in NEGATIONS or low.endswith("n't"):
            negations.append("not" if low.endswith("n't") else low)
        else:
            if word != low and not (starts_sentence and word == word.capitalize()):
                names.append(low.removesuffix("'s"))
            if low in OPPOSITES or low in ORDER_WORDS:
                opposites.append(low)
            if low not in FILLERS:
                words.append(stem(low.removesuffix("'s")))
        starts_sentence = False
    return Signature(numbers, names, negations, opposites, words, shape)


def agree(a: Signature, b: Signature, wording: str) -> bool:
    """Whether what is said on one side is said on the other."""
    if (a.numbers, a.negations, a.opposites, a.shape) != (b.numbers, b.negations, b.opposites, b.shape):
        return False
    # A name that begins a sentence looks like any other word; where the words are the same, so are the names.
    return a.words == b.words if wording == "same" else a.names == b.names
