"""The page at / in a real Chromium: what a person sees, and that nothing leaves for anywhere else."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("starlette", reason="starlette comes with fastattn[server]")
from fastattn.serve.page import page_routes
from tests.fake_server import FakeServer, run_fake
from tests.serve.harness import MODEL, Running, chat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

METRICS = """\
# HELP fastattn:num_requests_running Sequences that take part in steps.
fastattn:num_requests_running {n}
fastattn:num_requests_waiting 1
fastattn:generation_tokens_total {tokens}
fastattn:prompt_tokens_total {tokens}
fastattn:kv_cache_usage_perc 0.25
fastattn:prefix_cache_queries_total {tokens}
fastattn:prefix_cache_hits_total {hits}
fastattn:spec_decode_num_draft_tokens_total {drafts}
fastattn:spec_decode_num_accepted_tokens_total {hits}
fastattn:response_cache_lookups_total{{outcome="hit"}} {n}
fastattn:response_cache_lookups_total{{outcome="miss"}} {n}
fastattn:time_to_first_token_seconds_bucket{{le="0.01"}} {n}
fastattn:time_to_first_token_seconds_bucket{{le="+Inf"}} {n}
fastattn:inter_token_latency_seconds_bucket{{le="0.01",model="a"}} {n}
fastattn:inter_token_latency_seconds_bucket{{le="+Inf",model="a"}} {n}
"""


def metrics(n: int, drafts: int = 0) -> str:
    return METRICS.format(n=n, tokens=100 * n, hits=25 * n, drafts=drafts * n)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with run_fake(page_routes()) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(fake: FakeServer) -> None:
    """Each test has the server as new."""
    url = fake.url
    fake.__init__()  # type: ignore[misc]
    fake.url, fake.metrics = url, metrics(1)


# ---- in the browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright comes with fastattn[test]")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Seen:
    """What the browser reported while a test ran."""

    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def tab(browser: Any, fake: FakeServer, seen: Seen, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, loaded, with a clock that tests wind forward. Afterwards: no error, no request elsewhere."""
    size = getattr(request, "param", (1280, 800))
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme="light")
    context.set_default_timeout(15_000)
    tab = context.new_page()
    tab.on("request", lambda r: seen.requests.append(r.url))
    tab.on("pageerror", lambda error: seen.problems.append(str(error)))
    tab.on("console", lambda m: seen.problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("dialog", lambda d: (seen.dialogs.append(d.message), d.dismiss()))
    tab.clock.install()
    tab.goto(f"{fake.url}/")
    yield tab
    context.close()
    assert seen.requests and all(url.startswith(f"{fake.url}/") for url in seen.requests), seen.requests
    assert seen.problems == [] and seen.dialogs == []


def until(tab: Any, expression: str) -> None:
    """Waits for it to be true. Playwright's own waiting evaluates inside the page, which the page's policy forbids."""
    for _ in range(600):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(25)
    pytest.fail(f"never true: {expression}")


def ask(tab: Any, text: str = "What is it?", wait: bool = True) -> None:
    count = tab.locator(".assistant").count()
    tab.fill("#prompt", text)
    tab.press("#prompt", "Enter")
    if wait:
        finished(tab, count + 1)


def finished(tab: Any, count: int) -> None:
    """Waits for so many answers, and the end of the last."""
    until(tab, f"document.querySelectorAll('.assistant:not([aria-busy]) .message-actions').length === {count}")


def test_an_answer_streams_and_says_where_it_came_from(tab: Any, fake: FakeServer) -> None:
    fake.headers = {"x-fastattn-model": "small", "x-fastattn-route": "rule=short", "x-fastattn-cache": "miss"}
    fake.pieces, fake.gap, fake.gate = ("It is ", "**seven**", ", ", "I think."), 0.2, threading.Event()
    tab.wait_for_selector("#status[data-state=ok]")
    until(tab, "document.querySelectorAll('#model option').length > 0")  # another request than that of the state
    assert tab.locator("#model option").all_text_contents() == ["fake-small", "fake-large"]
    tab.select_option("#model", "fake-large")
    ask(tab, "How many?", wait=False)
    until(tab, "document.querySelector('.assistant .text').textContent.startsWith('It is')")
    assert tab.text_content(".assistant .text") != "It is seven, I think."  # it is not there all at once
    tab.clock.fast_forward(6000)  # so long that it hardly matters how slow this machine is
    fake.gate.set()
    finished(tab, 1)
    assert tab.text_content(".assistant .text") == "It is seven, I think."
    assert tab.text_content(".assistant strong") == "seven"
    assert tab.text_content(".user .text") == "How many?"
    chips = tab.locator(".chip").all_text_contents()
    assert chips[:3] == ["small", "rule=short", "not cached"] and chips[-1] == "4 tokens"
    assert re.fullmatch(r"[\d.]+ m?s to first", chips[3]) and re.fullmatch(r"[\d.]+ tokens/s", chips[4])
    assert float(chips[4].split()[0]) == pytest.approx(3 / 6.6, rel=0.4)
    (body,) = fake.bodies
    assert body["model"] == "fake-large" and body["messages"] == [{"role": "user", "content": "How many?"}]
    assert not {"temperature", "max_tokens", "seed", "top_p"} & set(body)  # what is not set is the server's to choose


def test_a_cached_answer_says_so(tab: Any, fake: FakeServer) -> None:
    fake.headers = {"x-fastattn-cache": "hit"}
    ask(tab)
    assert tab.text_content(".cache-chip.good") == "from the cache"
    assert tab.locator(".speed-chip").count() == 0  # a replay has no speed


def test_the_conversation_goes_on_and_begins_anew(tab: Any, fake: FakeServer) -> None:
    ask(tab, "one")
    ask(tab, "two")
    assert [m["content"] for m in fake.bodies[1]["messages"]] == ["one", "Hello world.", "two"]
    tab.locator(".assistant .again").first.click()
    until(tab, "document.querySelectorAll('.message').length === 2")
    finished(tab, 1)
    assert [m["content"] for m in fake.bodies[2]["messages"]] == ["one"]
    tab.click("#new")
    assert tab.locator(".message").count() == 0 and tab.is_visible("#empty")
    tab.click("#ideas button >> nth=0")
    finished(tab, 1)
    assert len(fake.bodies[3]["messages"]) == 1


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_answer_and_the_work(tab: Any, fake: FakeServer, how: str) -> None:
    fake.pieces, fake.gap = tuple("word " for _ in range(400)), 0.02
    ask(tab, wait=False)
    until(tab, "document.querySelector('.assistant .text').textContent.length > 10")
    tab.click("#stop") if how == "button" else tab.keyboard.press("Escape")
    tab.wait_for_selector(".chip.warn")
    assert tab.text_content(".chip.warn") == "stopped"
    assert tab.is_visible("#send") and not tab.is_visible("#stop")
    length = len(tab.text_content(".assistant .text"))
    assert 10 < length < 1900
    for _ in range(1000):
        if fake.num_left:
            break
        tab.wait_for_timeout(20)
    assert fake.num_left == 1  # the server saw us leave
    fake.pieces, fake.gap = ("ok",), 0
    ask(tab, "more")
    assert fake.bodies[1]["messages"][1]["content"].startswith("word word")


PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](  java\tscript:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html,<script>alert(1)</script>)",
    "[click](vbscript:alert(1))",
    "![image](https://evil.example/pixel.png?secret)",
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    "<style>body{background:url(https://evil.example/a)}</style>",
    "<math><mtext></table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=alert(1)&gt;\">",
    "```\"><img src=x onerror=alert(1)>\ncode\n```",
    "| a |\n|---|\n| <img src=x onerror=alert(1)> |",
    '<a href="javascript:alert(1)" onmouseover="alert(1)">x</a>',
    "<base href=https://evil.example/><form action=https://evil.example/><button>x",
    "[a]: javascript:alert(1)\n\n[a]",
    "> " * 3000 + "deep",
)  # fmt: skip


def test_what_a_model_says_is_text(tab: Any, fake: FakeServer, seen: Seen) -> None:
    """Hostile answers, whole and cut anywhere by the stream, make no element but those of Markdown, and no request."""
    fake.headers = {"x-fastattn-model": "<img src=x onerror=alert(1)>", "x-fastattn-route": "<b>x</b>"}
    for payload in PAYLOADS:
        pieces = [payload[i : i + 7] for i in range(0, len(payload), 7)] if len(payload) < 500 else [payload]
        fake.pieces = (*pieces, "\n\nand then")
        ask(tab, payload[:200])
        text = tab.locator(".assistant .text").last
        assert "and then" in text.text_content()
        names = text.evaluate("node => [...new Set([...node.querySelectorAll('*')].map(e => e.localName))]")
        allowed = {
            "p",
            "a",
            "span",
            "code",
            "pre",
            "div",
            "button",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "blockquote",
        }
        assert set(names) <= allowed, (payload, names)
        attributes = text.evaluate(
            "node => [...node.querySelectorAll('*')].flatMap(e => [...e.attributes].map(a => a.name))"
        )
        assert set(attributes) <= {"class", "href", "target", "rel", "title", "type", "tabindex"}, payload
        for href in text.evaluate("node => [...node.querySelectorAll('a')].map(a => a.href)"):
            assert href.startswith(("http://", "https://", "mailto:")), payload
        tab.click("#new")
    assert not seen.dialogs


def test_markdown_is_drawn(tab: Any, fake: FakeServer) -> None:
    fake.pieces = (
        "# Title\n\ntext with `code` & a < b\n\n- one\n- two\n  1. deep\n\n```py\nx = 1 < 2\n```\n\n",
        "| a | b |\n|---|--:|\n| 1 | 2 |\n\n[link](https://example.org/a?b=1&c=2)\n\n- [x] done\n",
    )
    ask(tab)
    text = tab.locator(".assistant .text")
    assert text.locator("h3").text_content() == "Title" and text.locator("p code").text_content() == "code"
    assert "& a < b" in text.text_content()
    assert text.locator("ul > li").count() == 3 and text.locator("ul ol li").text_content() == "deep"
    assert (
        text.locator("pre code").text_content() == "x = 1 < 2"
        and text.locator(".code-head span").text_content() == "py"
    )
    assert text.locator("td.to-right").text_content() == "2"
    link = text.locator("a")
    assert link.get_attribute("href") == "https://example.org/a?b=1&c=2"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow" and link.get_attribute("target") == "_blank"
    assert "☑ done" in text.text_content()


def test_charts_are_drawn_from_the_metrics(tab: Any, fake: FakeServer) -> None:
    tab.wait_for_selector(".card >> nth=0")
    for n in range(2, 8):
        fake.metrics = metrics(n, drafts=50)
        with tab.expect_response("**/metrics"):
            tab.clock.run_for(2000)
    until(tab, "document.querySelector('.card .value').textContent === '7'")
    shown = dict(zip(tab.locator(".card:visible h3").all_text_contents(), tab.locator(".card:visible .keys").all_text_contents(), strict=True))  # fmt: skip
    assert set(shown) == {
        "Requests", "Tokens/s", "Time to first token", "Between tokens", "KV cache in use", "Prefix cache hits",
        "Speculation accepted", "Answers from the cache",
    }  # fmt: skip
    assert shown["Requests"] == "running7waiting1"
    assert shown["KV cache in use"] == "25 %" and shown["Prefix cache hits"] == "25 %"
    assert shown["Speculation accepted"] == "50 %" and shown["Answers from the cache"] == "50 %"
    assert shown["Time to first token"] == "p505.0 msp959.5 ms"
    assert re.fullmatch(r"generated[\d.]+prompt[\d.]+", shown["Tokens/s"])
    lines = tab.locator(".card:visible path.line.s0")
    for index in range(8):
        assert lines.nth(index).get_attribute("d").count("L") >= 4
        assert lines.nth(index).bounding_box()["width"] > 5
    assert tab.locator(".card svg").first.get_attribute("aria-label") == "Requests: running 7, waiting 1"


def test_what_the_server_does_not_report_has_no_chart(tab: Any, fake: FakeServer) -> None:
    fake.metrics = "fastattn:num_requests_running 0\npython_info 1\n"
    with tab.expect_response("**/metrics"):
        tab.clock.run_for(2000)
    until(tab, "document.querySelectorAll('.card:not([hidden])').length === 1")


def test_figures_of_known_samples(tab: Any) -> None:
    """The arithmetic of the charts, by itself."""
    result = tab.evaluate(
        """async (texts) => {
          const { parse, quantile, figures } = await import("/static/metrics.js");
          const [before, now] = texts.map(parse);
          return { now: figures({ seconds: 12, metrics: now }, { seconds: 10, metrics: before }),
                   p25: quantile(now.get("h"), before.get("h"), 0.25), p99: quantile(now.get("h"), undefined, 0.99),
                   none: quantile(now.get("h"), now.get("h"), 0.5) };
        }""",
        [
            'fastattn:generation_tokens_total 100\nfastattn:h_bucket{le="1"} 10\nfastattn:h_bucket{le="+Inf"} 10\n',
            'fastattn:generation_tokens_total{m="a"} 90\nfastattn:generation_tokens_total{m="b"} 60\n'
            'fastattn:h_bucket{le="1"} 14\nfastattn:h_bucket{le="2"} 18\nfastattn:h_bucket{le="+Inf"} 18\n'
            'fastattn:kv_cache_usage_perc{m="a"} 0.5\nfastattn:kv_cache_usage_perc{m="b"} 0.7\n'
            "vllm:other 3\n",
        ],
    )
    assert result["now"]["generated"] == 25  # series are added up: (90 + 60 − 100) / 2 s
    assert result["now"]["kv"] == pytest.approx(0.6)
    assert result["now"].get("running") is None
    assert result["p25"] == pytest.approx(0.5) and result["p99"] == pytest.approx(1.955) and result["none"] is None


def test_settings_are_sent_and_kept_and_the_key_only_in_the_tab(tab: Any, fake: FakeServer) -> None:
    tab.click("#settings-open")
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "9",
        "seed": "4",
    }.items():
        tab.fill(f"[name={name}]", value)
    tab.check("[name=fresh]")
    tab.fill("[name=key]", "secret-key")
    tab.click("#settings-form .primary")
    fake.api_key = "secret-key"
    with tab.expect_request("**/v1/chat/completions") as asked:
        ask(tab)
    (body,) = fake.bodies
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {k: body[k] for k in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "seed": 4,
    }  # fmt: skip
    assert asked.value.headers["cache-control"] == "no-cache"
    assert "secret-key" not in tab.evaluate("JSON.stringify(localStorage)")
    assert tab.evaluate("sessionStorage.getItem('fastattn.key')") == "secret-key"
    tab.reload()
    assert tab.input_value("[name=temperature]") == "0.5"
    assert "secret" not in tab.content()
    ask(tab)
    fake.api_key = None
    tab.click("#settings-open")
    tab.click("#settings-reset")
    tab.keyboard.press("Escape")
    ask(tab)
    assert "temperature" not in fake.bodies[-1]


def test_a_server_that_wants_a_key_or_fails_says_so(tab: Any, fake: FakeServer, seen: Seen) -> None:
    tab.wait_for_selector("#status[data-state=ok]")
    fake.api_key = "secret"
    with tab.expect_response("**/metrics"):
        tab.clock.run_for(2000)
    tab.wait_for_selector("#status[data-state=key]")
    ask(tab)
    assert "the API key is missing or wrong: set the API key in the settings" in tab.text_content(".error")
    tab.click("#settings-open")
    tab.fill("[name=key]", "secret")
    tab.click("#settings-form .primary")
    tab.wait_for_selector("#status[data-state=ok]")
    fake.status = 503
    ask(tab, "again")
    assert tab.locator(".error").last.text_content() == "the model is away"
    fake.status, fake.cut_after = 200, 2
    ask(tab, "and again")
    assert "broke off" in tab.locator(".error").last.text_content()
    assert tab.locator(".assistant .text").last.text_content().startswith("Hello")
    # Chromium itself notes each answer that is an error.
    assert all("Failed to load resource" in problem for problem in seen.problems)
    seen.problems.clear()


def test_the_keyboard_is_enough(tab: Any, fake: FakeServer) -> None:
    assert tab.evaluate("document.activeElement.id") == "prompt"
    tab.keyboard.type("first")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("second")
    assert tab.input_value("#prompt") == "first\nsecond"
    tab.keyboard.press("Enter")
    finished(tab, 1)
    assert fake.bodies[0]["messages"][0]["content"] == "first\nsecond"
    reached = set()
    for _ in range(30):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"prompt", "send", "model", "new", "live-toggle", "theme", "settings-open", "log", "plain again"} <= reached
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => !e.textContent.trim() && !e.labels?.length).length"
    )
    assert unnamed == 0


def test_light_and_dark(tab: Any) -> None:
    def brightness() -> float:
        return float(
            tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)")[0]
        )

    assert brightness() > 200
    tab.click("#theme")
    assert brightness() < 60
    tab.reload()
    assert brightness() < 60  # remembered
    tab.click("#theme")
    assert brightness() > 200


@pytest.mark.parametrize("tab", [(360, 640), (1024, 700)], indirect=True)
def test_it_fits_small_screens(tab: Any, fake: FakeServer) -> None:
    fake.headers = {"x-fastattn-route": "rule=" + "long" * 40}
    fake.pieces = ("word " * 30, "\n\n```\n" + "x" * 300 + "\n```\n\n| " + "wide | " * 30 + "\n|" + "---|" * 30 + "\n")
    ask(tab, "w" * 300)
    narrow = tab.viewport_size["width"] < 900
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.is_visible("#live") is not narrow
    if narrow:
        tab.click("#live-toggle")
        assert tab.is_visible("#live")
    for selector in ("#live", "#log"):
        assert tab.evaluate(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{selector}'))"), selector
    box = tab.locator("#send").bounding_box()
    assert box["x"] + box["width"] <= tab.viewport_size["width"]


# ---- with the real server ----


def test_the_page_of_a_real_server(browser: Any, server: Running) -> None:
    """The server of the tests, the tiny model, the real metrics: an answer, its model, and moving charts."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab, problems, requests = context.new_page(), [], []
    tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("request", lambda r: requests.append(r.url))
    tab.goto(f"{server.url}/")
    tab.wait_for_selector("#status[data-state=ok]")
    tab.click("#settings-open")
    tab.fill("[name=max_tokens]", "12")
    tab.fill("[name=temperature]", "0")
    tab.click("#settings-form .primary")
    ask(tab, "hello")
    assert tab.text_content(".model-chip") == MODEL
    assert tab.text_content(".tokens-chip") == "12 tokens"
    expected = server.post("/v1/chat/completions", chat("hello", max_tokens=12, temperature=0)).json()
    shown = tab.text_content(".assistant .text")
    words = re.findall(r"\w+", expected["choices"][0]["message"]["content"])
    assert re.findall(r"\w+", shown) == words  # the rest is what Markdown makes of random signs
    until(tab, "[...document.querySelectorAll('.card:not([hidden]) h3')].length >= 5")
    until(tab, "document.querySelector('.card path.line').getAttribute('d').includes('L')")
    context.close()
    assert not problems and all(url.startswith(server.url) for url in requests)
