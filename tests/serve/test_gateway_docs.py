"""The files in the docs of router, cache and guardrails are what the server takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastattn.serve.config import load
from fastattn.serve.contract import RequestContext
from fastattn.serve.guardrails import build_guardrails
from fastattn.serve.router import build_router
from tests.serve.fakes import chat, saying, text, wait

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("router", "cache", "guardrails")
FILES = [
    (page, number, found)
    for page in PAGES
    for number, found in enumerate(re.findall(r"^```yaml\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.M | re.S))
]


@pytest.mark.parametrize(("page", "number", "content"), FILES, ids=lambda value: str(value)[:12])
def test_the_server_takes_it(tmp_path: Path, page: str, number: int, content: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    config = load({}, {}, file)
    assert getattr(config, page) is not None
    if config.router is not None:
        router = build_router(config.router, {"local": saying("x", logprobs=[-0.1])})
        assert wait(text(router, chat(model="gpt-4o-mini"), RequestContext("r"))) == "x"
    if config.guardrails is not None:
        guards = build_guardrails(config.guardrails, saying("see SEC-1234"))
        assert wait(text(guards, chat(), RequestContext("r"))) == "see [TICKET]"


def test_every_page_has_a_file() -> None:
    assert {page for page, _, _ in FILES} == set(PAGES)
