"""The router with scripted backends: which model answers, and what happens when one does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest

from fastattn.serve.contract import APIError
from fastattn.serve.router import Router, RouterConfig
from fastattn.serve.router.health import Breaker, RetryBudget
from fastattn.serve.router.language import LANGUAGES, language_of
from tests.serve.fakes import (
    Scripted,
    ask,
    chat,
    chunks,
    completion,
    context,
    error_of,
    saying,
    text,
    until,
    until_error,
    wait,
)

MODEL, ROUTE = "x-fastattn-model", "x-fastattn-route"


def router_of(backends: dict[str, Any], **fields: Any) -> Router:
    model_list = fields.pop("model_list", [{"model_name": name, "engine": name} for name in backends])
    config = RouterConfig.model_validate({"model_list": model_list} | fields)
    return Router(config, backends, {name: f"digest of {name}" for name in backends})


def failing(status: int = 500, *, after: Sequence[str] = (), times: int = 10**9) -> Scripted:
    """Raises so many times, after these pieces; then it answers "recovered"."""

    def answer(request: Any, _: Any) -> Any:
        if scripted.num_calls > times:
            return chunks(request, ["recovered"])
        return [*chunks(request, after, finish=None, usage=False), APIError(status, "scripted failure", "server_error")]

    scripted = Scripted(answer)
    return scripted


async def routed(router: Router, request: Any, ctx: Any = None) -> tuple[str, str, str]:
    ctx = ctx or context()
    answer = await ask(router, request, ctx)
    assert answer["model"] == ctx.headers[MODEL], "the answer says who gave it"
    return answer["choices"][0]["message"]["content"], ctx.headers[MODEL], ctx.headers[ROUTE]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.serve.router.router._FIRST_PAUSE", 0.001)


# ---- which model ----


def test_models_and_aliases_by_name() -> None:
    router = router_of({"a": saying("from a"), "b": saying("from b")}, model_group_alias={"gpt-4o": "b"})
    assert wait(routed(router, chat(model="a"))) == ("from a", "a", "fixed")
    assert wait(routed(router, chat(model="gpt-4o"))) == ("from b", "b", "fixed")
    error = wait(error_of(router, chat(model="../../etc/passwd"), context()))
    assert (error.status, error.code) == (404, "model_not_found") and "there are a, b, gpt-4o" in error.message
    assert router.model_names == ["a", "b", "gpt-4o"]


RULES = [
    {"name": "vip", "when": {"tenants": ["gold"]}, "use": "large"},
    {"name": "marked", "when": {"headers": {"x-tier": "pro|team"}}, "use": "large"},
    {"name": "long", "when": {"min_prompt_chars": 1000}, "use": "large"},
    {"name": "tools", "when": {"tools": True}, "use": "large"},
    {"name": "json", "when": {"structured": True}, "use": "large"},
    {"name": "german", "when": {"languages": ["de"]}, "use": "large"},
    {"name": "code", "when": {"matches": r"(?i)\b(python|rust)\b", "max_prompt_chars": 50}, "use": "large"},
]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("request_", "ctx", "rule"),
    [
        (chat("hello"), context(), None),
        (chat("hello"), context("gold"), "vip"),
        (chat("hello"), context("silver"), None),
        (chat("hello"), context(**{"x-tier": "pro"}), "marked"),
        (chat("hello"), context(**{"x-tier": "professional"}), None),
        (chat("x" * 1000), context(), "long"),
        (chat("x" * 999), context(), None),
        (chat("hello", tools=TOOLS), context(), "tools"),
        (chat("hello", response_format={"type": "json_object"}), context(), "json"),
        (chat("hello", response_format={"type": "text"}), context(), None),
        (chat("hello", structured_outputs={"regex": "a"}), context(), "json"),
        (chat("Wie ist das Wetter, und was ist mit der Bahn?"), context(), "german"),
        (chat("Explain Python to me"), context(), "code"),
        (chat("Explain pythons to me"), context(), None),
        (chat("Explain Python to me" + "!" * 50), context(), None),
        (completion([1] * 300), context(), "long"),
        (completion("rust?"), context(), "code"),
    ],
)
def test_rules(request_: Any, ctx: Any, rule: str | None) -> None:
    router = router_of(
        {"small": saying("s"), "large": saying("l")}, routes={"auto": {"rules": RULES, "default": "small"}}
    )
    wait(text(router, request_.model_copy(update={"model": "auto"}), ctx))
    assert ctx.headers[MODEL] == ("large" if rule else "small")
    assert ctx.headers[ROUTE] == (f"rule:{rule}" if rule else "default")


LANGUAGE_SAMPLES = {
    "en": "What is the best way to learn how the heart works?", "de": "Wie kann ich das am besten mit einer Zange reparieren?",
    "fr": "Comment est-ce que je peux faire cuire des pâtes dans une casserole ?",
    "es": "¿Cómo se hace una tortilla para los niños que no comen carne?",
    "it": "Come si può cucinare una torta che non sia troppo dolce per gli ospiti?",
    "pt": "Como é que você faz um bolo que não seja muito doce para os meninos?",
    "nl": "Hoe kan ik het best een fiets van een vriend op de weg repareren?",
    "pl": "Jak to się stało, że nie ma chleba w domu i co z tym zrobić?",
    "sv": "Hur är det att bo på landet och vad kan jag göra för att få det bättre?",
    "tr": "Bir ev için ne kadar para gerekir ve nasıl alınır?", "ja": "日本の首都はどこですか。", "ko": "한국의 수도는 어디입니까?",
    "zh": "中国的首都是哪里？", "ru": "Какая столица у России?", "el": "Ποια είναι η πρωτεύουσα;", "ar": "ما هي عاصمة مصر؟",
    "he": "מהי בירת ישראל?", "hi": "भारत की राजधानी क्या है?", "th": "เมืองหลวงของประเทศไทยคืออะไร",
}  # fmt: skip


def test_languages() -> None:
    assert {language: language_of(sample) for language, sample in LANGUAGE_SAMPLES.items()} == {
        language: language for language in LANGUAGES
    }
    assert [language_of(sample) for sample in ("", "12345", "zzz qqq", "print(x)")] == [None] * 4


# ---- attempts ----


def test_a_failure_is_retried_and_the_answer_is_whole() -> None:
    flaky = failing(times=2)
    router = router_of({"a": flaky})
    assert wait(routed(router, chat(model="a"))) == ("recovered", "a", "fixed")
    assert flaky.num_calls == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_the_client_did_wrong_is_not_retried(status: int) -> None:
    wrong = failing(status)
    router = router_of({"a": wrong, "b": saying("b")}, fallbacks={"a": ["b"]}, allowed_fails=1)
    assert wait(error_of(router, chat(model="a"), context())).status == status
    assert wait(error_of(router, chat(model="a"), context())).status == status, "nor does it open the breaker"
    assert wrong.num_calls == 2


def test_never_a_second_attempt_after_the_first_words() -> None:
    cut = failing(after=["half an "])
    router = router_of({"a": cut, "b": saying("b")}, fallbacks={"a": ["b"]})

    got, error = wait(until_error(router, chat(model="a"), context()))
    assert (got, error.message) == ("half an ", "scripted failure")
    assert cut.num_calls == 1


def test_a_failure_before_the_first_words_is_retried() -> None:
    """The role comes first and says nothing yet."""
    early = failing(after=[], times=1)
    assert wait(routed(router_of({"a": early}), chat(model="a")))[0] == "recovered"
    empty = Scripted(lambda request, _: [])
    router = router_of({"a": empty, "b": saying("b")}, fallbacks={"a": ["b"]})
    assert wait(routed(router, chat(model="a")))[0] == "b"


def test_fallbacks_are_named_and_not_cached() -> None:
    router = router_of({"a": failing(), "b": failing(), "c": saying("c")}, fallbacks={"a": ["b", "c"]}, num_retries=0)
    ctx = context()
    assert wait(routed(router, chat(model="a"), ctx)) == ("c", "c", "fixed;fallback-for=a")
    assert not ctx.cacheable


def test_deployments_of_one_model_share_and_stand_in() -> None:
    bad, good = failing(), saying("good")
    entries = [{"model_name": "m", "engine": "bad"}, {"model_name": "m", "engine": "good"}]
    router = router_of({"bad": bad, "good": good}, model_list=entries, allowed_fails=2)

    async def run() -> None:
        for _ in range(20):
            assert (await routed(router, chat()))[0] == "good"

    wait(run())
    assert bad.num_calls == 2, "then it rests"


def test_the_least_busy_deployment_is_next() -> None:
    backends = {name: saying("x") for name in ("a", "b", "c")}
    router = router_of(backends, model_list=[{"model_name": "m", "engine": name} for name in backends])

    async def run() -> list[int]:
        for backend in backends.values():
            backend.gate.clear()
        tasks = [asyncio.create_task(text(router, chat(), context())) for _ in range(9)]
        await until(lambda: sum(backend.num_running for backend in backends.values()) == 9)
        running = [backend.num_running for backend in backends.values()]
        for backend in backends.values():
            backend.gate.set()
        await asyncio.gather(*tasks)
        return running

    assert wait(run()) == [3, 3, 3]


def test_all_down_is_said_at_once() -> None:
    bad = failing()
    router = router_of({"a": bad}, num_retries=5, allowed_fails=3, cooldown_time=17.0)
    assert wait(error_of(router, chat(model="a"), context())).status == 500
    calls = bad.num_calls
    error = wait(error_of(router, chat(model="a"), context()))
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "model_unavailable", "17")
    assert bad.num_calls == calls == 3, "nobody is asked while it rests"


def test_retries_are_a_fifth_of_the_requests_at_most() -> None:
    bad = failing()
    router = router_of({"a": bad}, num_retries=5, allowed_fails=10**3)

    async def run() -> None:
        for _ in range(500):
            await error_of(router, chat(model="a"), context())

    wait(run())
    assert 500 + 90 <= bad.num_calls <= 500 + 100 + 10


def test_a_client_that_leaves_aborts_the_work_and_frees_the_trial() -> None:
    backend = saying("a", "b", "c")
    router = router_of({"a": backend})
    deployment = router._deployments["a"][0]

    async def run() -> None:
        for step in range(1, 4):
            async with aclosing(router.stream(chat(model="a"), context())) as stream:
                for _ in range(step):
                    await anext(stream)
            assert backend.num_left == step and deployment.num_in_flight == 0

    wait(run())


# ---- breaker and budget ----


def test_breaker() -> None:
    now = [0.0]
    breaker = Breaker(3, 10.0, lambda: now[0])
    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(3):
        assert breaker.acquire()
        breaker.failed()
    assert not breaker.acquire() and breaker.state == "open" and breaker.seconds_left == 10
    now[0] = 10.0
    assert breaker.state == "half_open"
    assert breaker.acquire() and not breaker.acquire(), "one tries"
    breaker.failed()
    assert breaker.seconds_left == 10
    now[0] = 20.0
    assert breaker.acquire()
    breaker.left()
    assert breaker.acquire(), "who left without a verdict frees the trial"
    breaker.alive()
    assert breaker.acquire() and breaker.acquire() and breaker.state == "closed"
    breaker.failed()
    assert breaker.state == "open", "it was on probation"
    breaker = Breaker(3, 10.0, lambda: now[0])
    breaker.failed(retry_after=5)
    assert breaker.seconds_left == 5


def test_budget() -> None:
    budget = RetryBudget(0.2, reserve=2)
    assert [budget.spend() for _ in range(3)] == [True, True, False]
    for _ in range(5):
        budget.request()
    assert [budget.spend() for _ in range(2)] == [True, False]
    assert not RetryBudget(0.0).spend()


def test_a_rest_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = failing(times=3)
    router = router_of(
        {"a": flaky, "b": saying("b")}, fallbacks={"a": ["b"]}, num_retries=0, allowed_fails=3, cooldown_time=5.0
    )
    now = [0.0]
    router._deployments["a"][0].breaker._clock = lambda: now[0]

    async def run() -> list[str]:
        names = [(await routed(router, chat(model="a")))[1] for _ in range(5)]
        now[0] = 5.0
        return names + [(await routed(router, chat(model="a")))[1] for _ in range(2)]

    assert wait(run()) == ["b"] * 5 + ["a"] * 2
    assert flaky.num_calls == 5


def test_an_engine_that_is_only_full_does_not_rest() -> None:
    """It said 429 once, which the breaker knew; it says 503, and was left alone for the cooldown."""

    def answer(request: Any, _: Any) -> Any:
        has_place = full.num_calls > 5
        return chunks(request, ["mine"]) if has_place else [APIError(503, "the queue is full", "overloaded_error")]

    full = Scripted(answer)
    router = router_of({"a": full, "b": saying("b")}, fallbacks={"a": ["b"]}, num_retries=0, allowed_fails=2)

    async def run() -> list[str]:
        return [(await routed(router, chat(model="a")))[1] for _ in range(6)]

    assert wait(run()) == ["b"] * 5 + ["a"]


# ---- cascade ----


def cascade_of(first: Any, then: Any, **fields: Any) -> Router:
    cascade = {"first": "small", "then": "large", "threshold": -0.5} | fields
    return router_of({"small": first, "large": then}, cascades={"careful": cascade}, num_retries=0)


@pytest.mark.parametrize(
    ("kind", "logprobs", "who"),
    [
        ("mean", [-0.1, -0.7], "small"),
        ("mean", [-0.1, -1.1], "large"),
        ("mean", [-0.5, -0.5], "small"),
        ("min", [-0.1, -0.4], "small"),
        ("min", [-0.1, -0.7], "large"),
        ("mean", [], "large"),
    ],
)
@pytest.mark.parametrize("make", [chat, completion], ids=["chat", "completion"])
def test_cascade(kind: str, logprobs: list[float], who: str, make: Any) -> None:
    small, large = saying("not ", "sure", logprobs=logprobs), saying("quite sure")
    router, ctx = cascade_of(small, large, confidence=kind), context()
    answer = wait(ask(router, make(model="careful"), ctx))
    assert ctx.headers[MODEL] == answer["model"] == who
    assert answer["choices"][0]["logprobs"] is None, "the client did not ask for them"
    assert large.num_calls == (who == "large")
    said = f"{sum(logprobs) / len(logprobs) if kind == 'mean' else min(logprobs):.3f}" if logprobs else "none"
    assert ctx.headers[ROUTE] == f"fixed;cascade=careful;confidence={said}" + (";escalated" if who == "large" else "")
    assert small.requests[0].logprobs is not None and large.requests == large.requests[:1]
    assert not large.requests or not large.requests[0].logprobs, "only the first is asked how sure it is"


def test_cascade_keeps_logprobs_that_were_asked_for() -> None:
    router = cascade_of(saying("a", "b", logprobs=[-0.1, -0.2]), saying("c"))
    answer = wait(ask(router, chat(model="careful", logprobs=True), context()))
    assert [row["logprob"] for row in answer["choices"][0]["logprobs"]["content"]] == [-0.1, -0.2]


def test_a_streamed_cascade_says_nothing_before_it_is_decided() -> None:
    small, large = saying("a", "b", "c", logprobs=[-3.0] * 3), saying("d")
    router = cascade_of(small, large)

    async def run() -> tuple[list[str], int]:
        ctx, got = context(), []
        async for chunk in router.stream(chat(model="careful", stream=True), ctx):
            assert large.num_calls == 1, "the decision was taken before"
            got += [c["delta"]["content"] for c in chunk["choices"] if c["delta"].get("content")]
        return got, small.num_running

    assert wait(run()) == (["d"], 0)


def test_cascade_without_its_second_model() -> None:
    unsure = saying("perhaps", logprobs=[-3.0])
    ctx = context()
    assert wait(text(cascade_of(unsure, failing()), chat(model="careful"), ctx)) == "perhaps"
    assert ctx.headers[MODEL] == "small" and ctx.headers[ROUTE].endswith(";unavailable=large") and not ctx.cacheable
    strict = cascade_of(unsure, failing(), if_unavailable="error")
    assert wait(error_of(strict, chat(model="careful"), context())).status == 500
    refused = cascade_of(unsure, failing(400))
    assert wait(error_of(refused, chat(model="careful"), context())).status == 400


def test_cascade_without_its_first_model() -> None:
    ctx = context()
    assert wait(text(cascade_of(failing(), saying("sure")), chat(model="careful"), ctx)) == "sure"
    assert ctx.headers[ROUTE] == "fixed;cascade=careful;confidence=none;escalated"
    assert wait(error_of(cascade_of(failing(400), saying("x")), chat(model="careful"), context())).status == 400
    ctx = context()
    wait(text(cascade_of(saying("s", logprobs=[0.0]), saying("l")), completion(model="careful", echo=True), ctx))
    assert ctx.headers[MODEL] == "large", "with echo the prompt's tokens would count"


def test_savings_are_counted() -> None:
    entries = [
        {"model_name": "small", "engine": "small", "input_cost": 1.0, "output_cost": 2.0},
        {"model_name": "large", "engine": "large", "input_cost": 10.0, "output_cost": 20.0},
    ]
    small = saying("a", "b", logprobs=[-0.1, -0.1])
    router = router_of({"small": small, "large": saying("x")}, model_list=entries,
                       cascades={"c": {"first": "small", "then": "large", "threshold": -0.5}})  # fmt: skip
    wait(text(router, chat(model="c"), context()))
    own, saved = 3 * 1.0 + 2 * 2.0, 3 * 9.0 + 2 * 18.0
    assert router.metrics.cost.labels("small")._value.get() == pytest.approx(own / 1e6)
    assert router.metrics.saved.labels("c")._value.get() == pytest.approx(saved / 1e6)
    assert router.metrics.cascades.labels("c", "kept")._value.get() == 1


def test_routes_may_use_cascades() -> None:
    router = router_of(
        {"small": saying("s", logprobs=[-0.1]), "large": saying("l")},
        cascades={"careful": {"first": "small", "then": "large", "threshold": -0.5}},
        routes={"auto": {"default": "careful"}},
        model_group_alias={"gpt-4o-mini": "auto"},
    )
    assert wait(routed(router, chat(model="gpt-4o-mini")))[2] == "default;cascade=careful;confidence=-0.100"


# ---- metrics, fingerprint ----


def test_labels_are_a_closed_set() -> None:
    """PYSEC-2026-4325: no label comes from a request."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    config = RouterConfig.model_validate({"model_list": [{"model_name": "a", "engine": "a"}]})
    router = Router(config, {"a": saying("x")}, registry=registry)
    wait(text(router, chat(model="a"), context()))
    before = len(generate_latest(registry).splitlines())

    async def run() -> None:
        for i in range(1000):
            await error_of(router, chat(model=f"odd {i}"), context(f"tenant {i}"))

    wait(run())
    assert len(generate_latest(registry).splitlines()) == before


def test_fingerprint_follows_what_answers() -> None:
    def fingerprint(digest: str = "d", base: dict[str, Any] | None = None, **fields: Any) -> str | None:
        upstream = {"model_name": "u", "api_base": "http://127.0.0.1:1/v1"} | (base or {})
        config = RouterConfig.model_validate({"model_list": [{"model_name": "a", "engine": "a"}, upstream]} | fields)
        return Router(config, {"a": saying("x")}, {"a": digest}).fingerprint("a")

    prints = [
        fingerprint(), fingerprint("e"), fingerprint(base={"revision": "2"}), fingerprint(base={"model": "n"}),
        fingerprint(routes={"r": {"default": "a"}}), fingerprint(model_group_alias={"b": "a"}),
    ]  # fmt: skip
    assert len(set(prints)) == len(prints) and None not in prints
    assert fingerprint(num_retries=5) == fingerprint(base={"api_key": "secret-key"}) == prints[0]
    assert "secret" not in str(prints)
    assert router_of({"a": saying("x")}).fingerprint("b") is None
