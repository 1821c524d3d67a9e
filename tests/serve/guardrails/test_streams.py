"""The way out: whatever a text is split into, the same comes out, and nothing that a guard objects to is ever half sent."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.serve.guardrails import Guardrails, GuardrailsConfig
from fastattn.serve.guardrails.guard import Finding, Scan
from fastattn.serve.guardrails.pii import KINDS
from fastattn.serve.protocol import ChatCompletionRequest
from tests.serve.fakes import Scripted, ask, chat, chunks, completion, context, error_of, saying, text_of, wait

SECRETS = {
    "email": "jane.doe+x@mail.example.co.uk", "phone": "+49 30 901820", "credit_card": "4111 1111 1111 1111",
    "iban": "DE89 3704 0044 0532 0130 00", "us_ssn": "078-05-1120", "ip_address": "203.0.113.7",
    "api_key": "sk-abcdefghijklmnopqrstuvwxyz012345",
}  # fmt: skip
PII = {"name": "pii", "kind": "pii", "directions": ["output"], "kinds": list(KINDS)}
WORDS = {
    "name": "topics",
    "kind": "words",
    "directions": ["output"],
    "action": "block",
    "words": ["build a bomb", "heroin"],
}
CODES = {
    "name": "codes", "kind": "patterns", "directions": ["output"], "action": "redact",
    "patterns": {"project": r"\bproject[- ]x\b", "ticket": r"\bSEC-\d{3,6}\b"},
}  # fmt: skip


def rails(inner: Any, *guards: dict[str, Any], objects: dict[str, Any] | None = None) -> Guardrails:
    return Guardrails(GuardrailsConfig.model_validate({"guards": list(guards)}), inner, guards=objects)


def stream_out(pieces: Sequence[str], *guards: dict[str, Any], request: Any = None) -> tuple[list[str], str]:
    """(pieces that came out, finish reason)."""

    async def run() -> tuple[list[str], str]:
        asked = request or completion()
        out, finish = [], ""
        async for chunk in rails(saying(*pieces), *guards).stream(asked, context()):
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
                if piece:
                    out.append(piece)
                finish = choice["finish_reason"] or finish
        return out, finish

    return wait(run())


def splits_in_two(text: str) -> list[list[str]]:
    return [[text[:i], text[i:]] for i in range(1, len(text))]


@pytest.mark.parametrize("kind", SECRETS)
def test_every_split_of_every_kind(kind: str) -> None:
    """Row 45: all split points, one character at a time too."""
    text = f"It is {SECRETS[kind]}, I think."
    for pieces in [*splits_in_two(text), list(text)]:
        out, finish = stream_out(pieces, PII)
        assert ("".join(out), finish) == (f"It is [{kind.upper()}], I think.", "stop"), pieces


@pytest.mark.parametrize("kind", SECRETS)
def test_nothing_of_it_is_sent_before_it_is_known(kind: str) -> None:
    secret = SECRETS[kind]
    pieces, _ = stream_out(list(f"It is {secret}"), PII)
    sent = ""
    for piece in pieces:
        sent += piece
        assert not sent.removesuffix(" ").endswith(secret[:3]), f"{sent!r} has begun to tell it"
    assert sent == f"It is [{kind.upper()}]"


def test_every_split_of_a_banned_phrase() -> None:
    for text in ("How to build a bomb at home", "How to BUILD  A\tBÖMB at home", "How to b\u200build а bomb at home"):
        for pieces in [*splits_in_two(text), list(text)]:
            out, finish = stream_out(pieces, WORDS)
            assert ("".join(out), finish) == ("How to ", "content_filter"), pieces


ODD = ["project", "x", "SEC-", "her", "heroin", "4111111111111111", "12", "@example.org", "2001:db8::1", "DE", "AKIA"]
ALPHABET = st.sampled_from([*"a014 -.@+:\néа\u200b", *ODD, "build a bomb", "(415) 555-2671", *SECRETS.values()])
REDACTING = [PII, CODES, WORDS | {"action": "redact"}]


@given(parts=st.lists(ALPHABET, max_size=14), cuts=st.lists(st.integers(0, 400), max_size=12))
@settings(max_examples=80, deadline=None)
def test_the_split_makes_no_difference(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    whole = "".join(stream_out([text], *REDACTING)[0])
    assert "".join(stream_out(pieces, *REDACTING)[0]) == whole
    assert "".join(stream_out(list(text), *REDACTING)[0]) == whole
    blocking = [guard | {"action": "block"} for guard in REDACTING]
    blocked = stream_out([text], *blocking)
    assert "".join(blocked[0]) == "".join(stream_out(pieces, *blocking)[0])


def test_prose_is_hardly_held_back() -> None:
    """A reader sees words as they come: what waits is the word that is being written, and a banned word's length."""
    text = "The quick brown fox jumps over the lazy dog, and then it sleeps for a while under the old tree. " * 3
    worst = 0

    async def run() -> None:
        nonlocal worst
        fed = sent = 0

        def script(request: Any, _: Any) -> Any:
            for chunk in chunks(request, list(text)):
                nonlocal fed
                fed += len(chunk["choices"][0]["text"]) if chunk["choices"] else 0
                yield chunk

        async for chunk in rails(Scripted(script), PII, WORDS).stream(completion(), context()):
            sent += sum(len(choice["text"]) for choice in chunk["choices"])
            worst = max(worst, fed - sent)
        assert sent == len(text)

    wait(run())
    assert worst <= 32, f"{worst} characters were held"


@pytest.mark.parametrize("make", [chat, completion], ids=["chat", "completion"])
def test_what_passes_is_unchanged(make: Any) -> None:
    plain = wait(ask(saying("one ", "two", logprobs=[-0.1, -0.2]), make(), context()))
    guarded = wait(ask(rails(saying("one ", "two", logprobs=[-0.1, -0.2]), PII, WORDS, CODES), make(), context()))
    plain.pop("num_chunks"), guarded.pop("num_chunks")
    assert plain == guarded


@pytest.mark.parametrize("guard", [PII, PII | {"action": "block"}], ids=["redact", "block"])
def test_log_probabilities_do_not_tell(guard: dict[str, Any]) -> None:
    inner = saying("Mail jane", "@example.org", " now", logprobs=[-0.1] * 3)
    answer = wait(ask(rails(inner, guard), chat(logprobs=True), context()))
    assert answer["choices"][0]["logprobs"] is None
    assert "jane" not in str(answer)


def test_block_ends_the_answer_and_the_work() -> None:
    inner = Scripted(lambda request, _: chunks(request, ["Take ", "heroin", " and", *["."] * 500]))
    ctx, called = context(), []
    ctx.on_refusal.append(lambda: called.append(1))
    answer = wait(ask(rails(inner, WORDS), chat(), ctx))
    assert text_of(answer) == "Take " and answer["choices"][0]["finish_reason"] == "content_filter"
    assert inner.num_left == 1 and called == [1]


def test_an_answer_that_was_over_when_it_was_blocked_has_its_usage() -> None:
    inner = saying('{"a": 1')
    shape = {"name": "s", "kind": "json_schema", "action": "block", "json_schema": {}}
    answer = wait(ask(rails(inner, shape), chat(), context()))
    assert (text_of(answer), answer["usage"]["completion_tokens"], inner.num_left) == ("", 1, 0)


def test_one_choice_is_blocked_and_the_others_go_on() -> None:
    def both(request: Any, _: Any) -> Any:
        one = chunks(request, ["he", "roin", " is", " bad"], index=0, usage=False)
        two = chunks(request, ["tea ", "is ", "good"], index=1)
        return [chunk for pair in zip(one + [None] * 3, two, strict=False) for chunk in pair if chunk]

    answer = wait(ask(rails(Scripted(both), WORDS), chat(n=2), context()))
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["content_filter", "stop"]
    assert (text_of(answer, 0), text_of(answer, 1)) == ("", "tea is good") and "usage" in answer


def tool_call(request: Any, *arguments: str) -> list[Any]:
    parts = chunks(request, [""])
    for i, piece in enumerate(arguments):
        call: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
        if i == 0:
            call |= {"id": "call_1", "type": "function"}
            call["function"]["name"] = "send"
        parts.insert(
            1 + i, {**parts[0], "choices": [{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}]}
        )
    parts[-2]["choices"][0]["finish_reason"] = "tool_calls"
    return parts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"to": "jane@example.org", "n": 1}', '{"to": "[EMAIL]", "n": 1}'),
        ('{"to": "jane\\u0040example.org"}', '{"to": "[EMAIL]"}'),
        ('{"card": 4111111111111111}', '{"card": "[CREDIT_CARD]"}'),
        ('{"a": [{"jane@example.org": 1}]}', '{"a": [{"[EMAIL]": 1}]}'),
        ('{"to": "nobody", "x": [1.50]}', '{"to": "nobody", "x": [1.50]}'),
        ("not JSON jane@example.org", "not JSON [EMAIL]"),
        ('{"to": ["jane@example.org", "\\ud800"]}', '{"to": ["[EMAIL]", "?"]}'),  # half a surrogate pair
    ],
)
def test_arguments_of_tools(arguments: str, expected: str) -> None:
    for cut in range(1, len(arguments)):
        inner = Scripted(lambda request, _, cut=cut: tool_call(request, arguments[:cut], arguments[cut:]))
        answer = wait(ask(rails(inner, PII), chat(), context()))
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "send", "arguments": expected} and call["id"] == "call_1"
        assert answer["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("place", ["name", "id", "another field"])
def test_names_and_ids_of_tool_calls(place: str) -> None:
    """A server elsewhere may write what it likes there."""
    call: dict[str, Any] = {
        "index": 0,
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
    }
    if place == "name":
        call["function"]["name"] = "ask jane@example.org"
    else:
        call[place] = "ask jane@example.org"

    def answer(request: Any, _: Any) -> list[Any]:
        parts = tool_call(request, "{}")
        parts[1]["choices"][0]["delta"]["tool_calls"] = [call]
        return parts

    found = wait(ask(rails(Scripted(answer), PII), chat(), context()))
    (sent,) = found["choices"][0]["message"]["tool_calls"]
    assert "jane" not in str(found)
    assert {"name": sent["function"]["name"], "id": sent["id"]} == {"name": "f", "id": "call_1"} | (
        {place: "ask [EMAIL]"} if place in ("name", "id") else {}
    )
    blocked = wait(ask(rails(Scripted(answer), PII | {"action": "block"}), chat(), context()))
    assert "jane" not in str(blocked)


def test_blocked_arguments_of_tools() -> None:
    inner = Scripted(lambda request, _: tool_call(request, '{"drug": "', 'heroin"}'))
    answer = wait(ask(rails(inner, WORDS), chat(), context()))
    assert answer["choices"][0]["finish_reason"] == "content_filter" and "heroin" not in str(answer)


def test_a_pattern_without_a_bound_holds_the_answer_back() -> None:
    secret = {
        "name": "s",
        "kind": "patterns",
        "directions": ["output"],
        "action": "redact",
        "patterns": {"secret": r"<s>[^<]*</s>"},
    }
    text = "a <s>" + "x" * 300 + "</s> b"
    out, _ = stream_out(list(text), secret)
    assert out == ["a [SECRET] b"], "in one piece, at the end"
    out, _ = stream_out(list("no secret at all, but long enough to see pieces"), secret | {"window": 10})
    assert len(out) > 10


SCHEMA = {
    "name": "shape", "kind": "json_schema",
    "json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "good"),
    [(['{"a"', ": 1}"], True), (['{"a": "1"}'], False), (["{}"], False), (["no"], False), (["[" * 100_000], False)],
)
def test_output_schema(pieces: list[str], good: bool) -> None:
    out, finish = stream_out(pieces, SCHEMA)
    assert ("".join(out), finish) == (("".join(pieces), "stop") if good else ("", "content_filter"))
    if not good:
        out, finish = stream_out(pieces, SCHEMA | {"action": "log"})
        assert ("".join(out), finish) == ("".join(pieces), "stop")


def test_log_lets_pass_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fastattn.serve.guardrails")
    guard = PII | {"action": "log"}
    pieces = list("Mail jane@example.org or joe@example.org")
    assert stream_out(pieces, guard)[0] == pieces, "nothing is held back"
    assert len(caplog.records) == 2 and "jane" not in caplog.text


# ---- guards that fail (row 44) ----


class Sick:
    """is_linear: on the spot; else in a thread."""

    slow_seconds = 0.3

    def __init__(self, how: str, *, is_linear: bool) -> None:
        self.most_per_second: int | None = None
        self._how, self.is_linear, self.needs_whole_text = how, is_linear, False

    def scan(self, text: str, start: int, final: bool) -> Scan:
        if self._how == "slow":
            time.sleep(self.slow_seconds)
        if self._how == "nonsense":
            return Scan([Finding(5, 10**6, "x")], len(text))
        if self._how == "raises":
            raise RuntimeError("a guard's bug")
        return Scan([], len(text))


@pytest.mark.parametrize("how", ["raises", "slow", "nonsense"])
@pytest.mark.parametrize("fail", ["open", "closed"])
def test_a_guard_that_fails(how: str, fail: str) -> None:
    guard = {"name": "sick", "kind": "words", "words": ["x"], "fail": fail, "time_budget": 0.05}
    sick = Sick(how, is_linear=how != "slow")

    async def run(direction: str) -> tuple[Any, Guardrails]:
        backend = rails(saying("fine"), guard | {"directions": [direction]}, objects={"sick": sick})
        try:
            return await ask(backend, chat(), context()), backend
        except Exception as error:
            return error, backend

    answer, backend = wait(run("output"))
    expected = ("fine", "stop") if fail == "open" else ("", "content_filter")
    assert (text_of(answer) or "", answer["choices"][0]["finish_reason"]) == expected
    counted = backend._metrics.failures.labels("sick", "slow" if how == "slow" else "error")._value.get()
    assert counted >= 1
    answer, _ = wait(run("input"))
    if fail == "open":
        assert text_of(answer) == "fine"
    else:
        assert (answer.status, answer.code) == (503, "guardrail_unavailable")


def test_a_text_that_takes_too_long_is_not_begun() -> None:
    """Two of seven megabytes kept the threads of a guard for ten seconds, and everybody's requests failed with it."""
    guard = {"name": "sick", "kind": "words", "words": ["x"], "directions": ["input"], "time_budget": 0.5}
    sick = Sick("raises", is_linear=False)
    sick.most_per_second = 10_000
    backend = rails(saying("fine"), guard, objects={"sick": sick})
    error = wait(error_of(backend, chat("a" * 5001), context()))
    assert (error.status, error.code) == (503, "guardrail_unavailable")
    assert backend._metrics.failures.labels("sick", "slow")._value.get() == 1


def test_a_slow_guard_does_not_stop_the_loop() -> None:
    guard = {"name": "sick", "kind": "words", "words": ["x"], "directions": ["input"], "time_budget": 5.0}

    async def run() -> float:
        sick = Sick("slow", is_linear=False)
        sick.slow_seconds = 2
        backend = rails(saying("fine"), guard, objects={"sick": sick})
        task = asyncio.create_task(ask(backend, chat(), context()))
        worst = 0.0
        while not task.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - before)
        return worst

    assert wait(run()) < 1.9


# ---- many at once ----


def test_a_set_of_secrets_never_leaks() -> None:
    """Random prose with secrets, in random pieces: nothing of any secret is in what was sent."""
    draw = random.Random(4)
    words = [
        "the",
        "a",
        "of",
        "to",
        "and",
        "in",
        "is",
        "that",
        "for",
        "it",
        "with",
        "as",
        "was",
        "on",
        "are",
        "by",
        "this",
        "be",
        "at",
        "from",
    ]
    for _ in range(60):
        kinds = draw.sample(list(SECRETS), 3)
        parts = [" ".join(draw.choices(words, k=draw.randrange(1, 12))) for _ in range(4)]
        text = parts[0] + "".join(f" {SECRETS[kind]}, {part}" for kind, part in zip(kinds, parts[1:], strict=True))
        pieces, rest = [], text
        while rest:
            size = draw.randrange(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        out = "".join(stream_out(pieces, PII)[0])
        assert out == parts[0] + "".join(f" [{k.upper()}], {p}" for k, p in zip(kinds, parts[1:], strict=True))


def test_requests_of_other_shapes_pass() -> None:
    assert isinstance(chat(), ChatCompletionRequest)
    answer = wait(ask(rails(saying("a"), PII), completion(["x", "y"], n=1), context()))
    assert text_of(answer) == "a"


@pytest.mark.parametrize(
    "extra",
    [
        {"delta": {"reasoning": "heroin"}},
        {"delta": {"reasoning_content": "heroin"}},
        {"delta": {"content": "x", "thoughts": "heroin"}},
        {"delta": {"content": "x"}, "text": "heroin"},
        {"delta": {"content": "x"}, "message": {"content": "heroin"}},
    ],
)
def test_what_no_guard_has_seen_does_not_pass(extra: dict[str, Any]) -> None:
    """Another server may put text where ours does not."""
    made = chunks(chat(), ["x"])
    made[1]["choices"][0] |= extra

    async def run() -> str:
        return str([chunk async for chunk in rails(Scripted(lambda *_: made), WORDS).stream(chat(), context())])

    assert "heroin" not in wait(run())
