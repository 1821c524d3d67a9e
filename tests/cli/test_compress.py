"""quantize, prune, distill, eval and inspect as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastattn.compress.sources
import fastattn.models.loader
from tests.cli.conftest import Invoke
from tests.cli.test_commands import one_line_error

EVAL = ("--length", "48", "--max-tokens", "192", "--device", "cpu")


@pytest.fixture(autouse=True)
def _tiny_by_name(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """invoke's "tiny", where these commands look for models."""
    monkeypatch.setattr(fastattn.compress.sources, "open_model", fastattn.models.loader.open_model)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40)
    return str(path)


def calibration(text: str) -> tuple[str, ...]:
    return ("--calibration", text, "--samples", "4", "--length", "48", "--device", "cpu", "-q")


def test_quantize_then_inspect(invoke: Invoke, tmp_path: Path, text: str) -> None:
    out = str(tmp_path / "out")
    result = invoke("quantize", "tiny", out, "--scheme", "nvfp4", *calibration(text))
    assert result.exit_code == 0, result.output
    assert result.stdout == "" and result.stderr == ""
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["format"]
        == "nvfp4-pack-quantized"
    )
    assert "is there already" in one_line_error(invoke("quantize", "tiny", out, "--scheme", "none"))
    assert invoke("quantize", "tiny", out, "--scheme", "none", "--force", "-q").exit_code == 0


def test_a_run_says_what_it_made(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("quantize", "tiny", str(tmp_path / "out"), "--scheme", "none")
    assert result.exit_code == 0, result.output
    assert result.stdout == "" and "KiB, from" in result.stderr
    shown = invoke("inspect", str(tmp_path / "out"))
    assert "llama, 2 layers, hidden 32" in shown.stdout and "receipt      quantize of tiny" in shown.stdout
    assert "32.00 bits each" in shown.stdout
    found = json.loads(invoke("inspect", str(tmp_path / "out"), "--json", "--zeros").stdout)
    assert found["receipt"]["method"] == {"scheme": "none"} and found["groups"][1]["sparsity"] == 0


def test_prune_and_eval(invoke: Invoke, tmp_path: Path, text: str) -> None:
    out = str(tmp_path / "out")
    assert invoke("prune", "tiny", out, "--method", "sparsegpt", *calibration(text)).exit_code == 0
    result = invoke("eval", out, "--against", "tiny", "--text", text, *EVAL, "--json", "-q")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kl_mean"] > 0 and 0 <= found["top1"] <= 1 and found["num_tokens"] == 4 * 47
    table = invoke("eval", out, "--text", text, *EVAL, "-q").stdout
    assert "perplexity" in table and "KL" not in table


def test_distill(invoke: Invoke, tmp_path: Path, text: str) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "out"
    sizes = ("--steps", "2", "--batch-size", "2", "--length", "32")
    result = invoke("distill", "tiny", str(out), "--teacher", "tiny", "--text", text, *sizes, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "receipt.json").read_text())["training"]["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "nowhere", "OUT"), "model 'nowhere': no such file"),
        (("quantize", "tiny", "OUT", "--scheme", "int3"), "'int3' is not one of 'int8', 'fp8', 'int4'"),
        (("quantize", "tiny", "OUT", "--smooth", "2"), "smooth is 2.0, allowed is 0 to 1"),
        (("quantize", "tiny", "OUT", "--samples", "0"), "samples is 0, allowed is an integer from 1"),
        (("quantize", "tiny", "OUT", "--calibration", "/nowhere.txt"), "/nowhere.txt: No such file"),
        (("quantize", "tiny", "OUT", "--group-size", "64"), "only scheme 'int4' has one"),
        (("quantize", "tiny", "OUT", "--scheme", "mxfp4"), "scheme 'mxfp4' needs multiples of 32 columns"),
        (("prune", "tiny", "OUT", "--method", "layers"), "drop is 0, allowed is from 1"),
        (("prune", "tiny", "OUT", "--drop", "1"), "only method 'layers' drops any"),
        (("distill", "tiny", "OUT"), "Missing option '--teacher'"),
        (("distill", "tiny", "OUT", "--teacher", "tiny", "--lr", "-1"), "learning_rate is -1.0, allowed is above 0"),
        (("eval", "tiny", "--length", "1"), "length is 1, allowed is from 2"),
        (("eval", "tiny", "--max-tokens", "x"), "'x' is not a size"),
        (("inspect", "/nowhere"), "no such file or folder"),
    ],
)
def test_errors_are_one_line(invoke: Invoke, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    out = str(tmp_path / "out")
    line = one_line_error(invoke(*(out if word == "OUT" else word for word in arguments)))
    assert message in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
