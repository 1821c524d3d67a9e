"""The page's files: how they are served, and what they may not hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import httpx
import pytest

pytest.importorskip("starlette", reason="starlette comes with fastattn[server]")
from fastattn.serve import page as page_module
from fastattn.serve.app import make_app
from fastattn.serve.auth import Keys
from fastattn.serve.config import ServeConfig
from fastattn.serve.page import FOLDER, page_routes
from fastattn.serve.state import ServerState
from tests.fake_server import FakeServer, run_fake

MARKED_SHA256 = "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de"  # of npm's marked 18.2.1


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with run_fake(page_routes()) as server:
        yield server


def test_every_file_is_served_with_the_policy_and_nothing_else_is(fake: FakeServer) -> None:
    with httpx.Client(base_url=fake.url, trust_env=False) as client:
        names = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()]
        served = [name for name in names if not name.endswith("LICENSE")]
        assert set(page_module.load_assets()) == set(served) and len(served) >= 10
        for name in served:
            answer = client.get("/" if name == "index.html" else f"/static/{name}")
            assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
            assert answer.headers["content-security-policy"] == page_module.POLICY
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = client.get(answer.url.path, headers={"if-none-match": answer.headers["etag"]})
            assert again.status_code == 304 and not again.content
        for path in (
            "/static/",
            "/static/../page.py",
            "/static/%2e%2e/page.py",
            "/static/vendor/marked.LICENSE",
            "/index.html",
        ):
            assert client.get(path).status_code == 404
        assert client.post("/").status_code == 405


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    for directive in page_module.POLICY.split("; "):
        name, *sources = directive.split()
        assert set(sources) <= ({"'script'"} if name == "require-trusted-types-for" else {"'self'", "'none'"}), (
            directive
        )
    assert "default-src 'none'" in page_module.POLICY


def test_the_files_name_no_other_host_and_make_no_html_of_text() -> None:
    for path in FOLDER.glob("*"):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"//[a-z0-9-]+\.[a-z]", text.replace("http://www.w3.org/2000/svg", "")), path.name
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert hashlib.sha256((FOLDER / "vendor/marked.js").read_bytes()).hexdigest() == MARKED_SHA256


def test_the_page_may_be_below_a_prefix() -> None:
    """A proxy takes it off; a path from the root would miss the server."""
    for path in (*FOLDER.glob("*.js"), FOLDER / "index.html"):
        assert not re.search(r"""(?:href|src)="/|call\(["'`]/|(?:from|import\() ?["']/""", path.read_text()), path.name
    state = ServerState(ServeConfig(model="m", root_path="/a/llm"), Keys([]))
    assert make_app(state).openapi()["servers"] == [{"url": "/a/llm"}]
