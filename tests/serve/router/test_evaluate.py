"""`fastattn router evaluate`: the table, the file and the picture."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fastattn.cli.main import app
from fastattn.serve.router.evaluate import Judged, agreement, curve, read_prompts
from tests.serve.fakes import chat
from tests.serve.router.test_upstream import Peer, lines

# The small model knows the odd ones and is sure of those; of number 4 it is wrongly sure.
SURE = {1: -0.1, 2: -2.0, 3: -0.2, 4: -0.3, 5: -0.15, 6: -3.0}


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    async def handle(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        number = int(body["messages"][0]["content"].split()[-1])
        small = body["model"] == "small"
        right = not small or number % 2 == 1
        words = ["right ", "answer"] if right else ["nonsense"]
        data = lines(chat(), *words, logprobs=[SURE[number]] * len(words)) + b"data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + data)
        await writer.drain()

    found, ready, loop, done = Peer(handle), threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with found.running():
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield found
    loop.call_soon_threadsafe(done.set)
    thread.join(10)


def files(folder: Path, peer: Peer, *, references: bool, priced: bool) -> list[str]:
    prices = {"output_cost": 1.0}, {"output_cost": 10.0}
    section = {
        "model_list": [
            {"model_name": "small", "engine": "local"} | (prices[0] if priced else {}),
            {"model_name": "large", "api_base": peer.base} | (prices[1] if priced else {}),
        ],
        "cascades": {"careful": {"first": "small", "then": "large", "threshold": -0.5}},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump({"model": "smollm2", "router": section}))
    rows = [{"prompt": f"number {i}"} | ({"reference": "right answer"} if references else {}) for i in SURE]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return ["router", "evaluate", str(folder / "prompts.jsonl"), "--config", str(folder / "serve.yaml")]


@pytest.mark.parametrize("references", [True, False], ids=["reference", "agreement"])
def test_evaluate(tmp_path: Path, peer: Peer, references: bool) -> None:
    command = files(tmp_path, peer, references=references, priced=True)
    result = CliRunner().invoke(app, [*command, "--url", peer.base, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "threshold" in result.output and "quality by lot" in result.output
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["judge"] == ("reference" if references else "agreement") and found["currency"] == "price"
    points = found["points"]
    assert (points[0]["escalated"], points[0]["quality"]) == (0, 0.5)
    assert (points[-1]["escalated"], points[-1]["quality"]) == (1, 1)
    assert [p["escalated"] for p in points] == sorted(p["escalated"] for p in points)
    third = next(p for p in points if p["escalated"] == 0.5)
    assert third["quality"] == 1 > third["random"] == 0.75, "its confidence is worth something"
    assert third["cost"] == pytest.approx((3 * 2 + 3 * 1 + 3 * 20) / 6 / 1e6)
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_what_evaluate_needs(tmp_path: Path, peer: Peer) -> None:
    command = files(tmp_path, peer, references=False, priced=False)

    def message(*more: str) -> str:
        result = CliRunner().invoke(app, [*command, *more])
        assert result.exit_code == 2, result.output
        return result.output

    assert "start it, and give --url" in message()
    assert "--cascade is 'other', the file has careful" in message("--cascade", "other", "--url", peer.base)
    assert "cannot be reached" in message("--url", "http://127.0.0.1:9")
    (tmp_path / "serve.yaml").write_text("model: x\n")
    assert "there is no router section in it" in message()


def test_without_prices_cost_is_counted_in_answers(tmp_path: Path, peer: Peer) -> None:
    command = files(tmp_path, peer, references=False, priced=False)
    result = CliRunner().invoke(app, [*command, "--url", peer.base, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0 and "capable answers a prompt" in result.output
    points = json.loads((tmp_path / "out" / "evaluation.json").read_text())["points"]
    assert [p["cost"] for p in points] == pytest.approx([p["escalated"] for p in points])


def test_curve() -> None:
    judged = [Judged(-1.0, 0.0, 1.0, 1.0, 5.0), Judged(-0.1, 1.0, 1.0, 1.0, 5.0), Judged(None, 0.5, 1.0, 1.0, 5.0)]
    points = [(p.threshold, p.escalated, p.cost, p.quality) for p in curve(judged)]
    assert points == [
        (-1.0, pytest.approx(1 / 3), pytest.approx(8 / 3), pytest.approx(2 / 3)),
        (-0.1, pytest.approx(2 / 3), pytest.approx(13 / 3), 1.0),
        (0.0, 1.0, 6.0, 1.0),
    ]


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("Paris", "paris.", 1),
        ("It is Paris", "Paris", 0.5),
        ("London", "Paris", 0),
        ("", "", 1),
        ("", "x", 0),
        ("a a", "a", 2 / 3),
    ],
)
def test_agreement(answer: str, reference: str, value: float) -> None:
    assert agreement(answer, reference) == pytest.approx(value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "there is no prompt in it"),
        ("{", ":1: it is not JSON"),
        ("[]", ":1: expected an object"),
        ('{"prompt": "a", "messages": []}', "expected either"),
        ('{"prompt": 1}', "are texts"),
        ('{"prompt": "a", "colour": 1}', "expected an object"),
        ('{"prompt": "a", "reference": "b"}\n\n{"prompt": "a"}', "some prompts have a reference"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        read_prompts(path)
