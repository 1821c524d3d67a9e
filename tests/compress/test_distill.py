"""A pruned student learns from its teacher, keeps its zeros, and can be interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.compress import (
    CalibrationOptions,
    DistillOptions,
    EvalOptions,
    PruneOptions,
    distill,
    evaluate,
    prune,
    read_receipt,
)
from fastattn.compress.distill import Trainer, hf_module, is_two_of_four, schedule
from fastattn.models.loader import ModelFileError, open_model
from fastattn.models.registry import load_model
from tests.compress.test_export import GEMMA
from tests.compress.test_output import Killed, contents
from tests.engine.tiny import CONFIG, TinySource, full_logits

pytest.importorskip("transformers")

QUICK = DistillOptions(steps=12, batch_size=4, micro_batch=2, length=48, learning_rate=3e-3)


def test_a_pruned_student_recovers_and_keeps_its_zeros(
    source: TinySource, calibration: CalibrationOptions, text: str, tmp_path: Path
) -> None:
    pruned = prune(source, tmp_path / "pruned", PruneOptions(calibration=calibration))
    options = replace(QUICK, files=(text,), steps=40)
    out = distill(str(pruned), tmp_path / "out", source, options)
    judged = EvalOptions((text,), 48, 192)
    before, after = (evaluate(str(path), source, judged).kl_mean or 0 for path in (pruned, out))
    assert after < 0.6 * before
    kept = open_model(out)
    sparse = 0
    for name, info in kept.tensors().items():
        values = torch.empty(info.shape)
        kept.read(name, values)
        if "_proj" in name:
            assert ((values != 0).view(-1, 4).sum(1) <= 2).all(), name
            sparse += 1
        elif name == "model.embed_tokens.weight":
            expected = torch.empty(info.shape)
            source.read(name, expected)
            assert torch.equal(values, expected)  # frozen unless asked for
    assert sparse == 14
    training = (read_receipt(out) or {})["training"]
    assert training["steps"] == 40 and training["sparse_matrices"] == 14
    assert training["kl_last"] < training["kl_first"]


def test_fewer_layers_learn_too(text: str, tmp_path: Path) -> None:
    source = TinySource(config=replace(CONFIG, num_layers=4, layer_is_sliding=()))
    calibration = CalibrationOptions((text,), 4, 48)
    pruned = prune(source, tmp_path / "pruned", PruneOptions("layers", drop=1, calibration=calibration))
    out = distill(str(pruned), tmp_path / "out", source, replace(QUICK, files=(text,), train_embeddings=True))
    judged = EvalOptions((text,), 48, 192)
    before, after = (evaluate(str(path), source, judged).kl_mean or 0 for path in (pruned, out))
    assert after < before and open_model(out).config.num_layers == 3


def test_interrupted_training_goes_on_to_the_same_weights(
    source: TinySource, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = TinySource(seed=1, config=source.config)
    options = replace(QUICK, files=(text,), checkpoint_minutes=0.0)
    expected = contents(distill(source, tmp_path / "expected", teacher, options))
    real = Trainer.train_step

    def train_step(self: Trainer, network: Any, batch: Any) -> float:
        if self.step == 7:
            raise Killed
        return real(self, network, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(Killed):
        distill(source, tmp_path / "out", teacher, options)
    monkeypatch.setattr(Trainer, "train_step", real)
    found = contents(distill(source, tmp_path / "out", teacher, options))
    for both in (found, expected):
        del both["receipt.json"]["training"]["seconds"]
    assert found == expected


def test_the_teacher_may_write_the_text(source: TinySource, text: str, tmp_path: Path) -> None:
    options = replace(QUICK, files=(text,), generate=3, steps=2, batch_size=2)
    out = distill(TinySource(seed=1, config=source.config), tmp_path / "out", source, options)
    assert (read_receipt(out) or {})["training"]["tokens"] == 2 * 2 * 48
    assert sorted(path.suffix for path in out.iterdir() if path.suffix != ".safetensors") == [".json"] * 6


def test_a_text_too_short_begins_no_folder(source: TinySource, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("hi")
    with pytest.raises(ValueError, match="has 2 tokens, expected at least a window of 48"):
        distill(source, tmp_path / "out", source, replace(QUICK, files=(str(tmp_path / "short.txt"),)))
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_time_is_a_limit_too(source: TinySource, text: str, tmp_path: Path) -> None:
    options = replace(QUICK, files=(text,), steps=10**6, max_minutes=1 / 60)
    out = distill(TinySource(seed=1, config=source.config), tmp_path / "out", source, options)
    training = (read_receipt(out) or {})["training"]
    assert 0 < training["steps"] < 10**6 and 1 <= training["seconds"] < 30


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["llama", "gemma3"])
def test_the_trained_module_is_the_model(config: Any) -> None:
    source = TinySource(config=config)
    tokens = [0, 5, 9, 33, 70, 41, 12, 99]
    with torch.no_grad():
        found = hf_module(source)(torch.tensor([tokens])).logits[0]
    network = load_model(source, torch.device("cpu"), torch.float32, 16)
    torch.testing.assert_close(found, full_logits(network, tokens), rtol=1e-3, atol=2e-3)


def test_schedule() -> None:
    assert schedule(0) == pytest.approx(0.02) and schedule(0.025) == pytest.approx(0.5)
    assert schedule(0.06) > 0.97 and schedule(1.0) == pytest.approx(0.1)
    values = [schedule(0.05 + 0.95 * i / 50) for i in range(51)]
    assert values == sorted(values, reverse=True)


def test_two_of_four_is_recognized() -> None:
    assert is_two_of_four(torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 3]]))
    assert not is_two_of_four(torch.tensor([[1.0, 0, 2, 4]]))
    assert not is_two_of_four(torch.ones(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, allowed is an integer from 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, allowed is above 0"),
        ({"max_minutes": -1}, "max_minutes is -1, allowed is above 0"),
        ({"seed": -1}, "seed is -1, allowed is an integer from 0"),
        ({"seed": 2**64}, "allowed is an integer from 0, below"),
        ({"weight_decay": 2}, "weight_decay is 2, allowed is from 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions(**options)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a busy machine must make it later, not worse: steps end the training, and no clock
def test_smollm2_without_a_fifth_of_its_layers(tmp_path: Path) -> None:
    """The recipe of docs/prune_distill.md, shorter."""
    try:
        open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had here: {error}")
    calibration = CalibrationOptions(samples=8)
    pruned = prune("smollm2", tmp_path / "pruned", PruneOptions("layers", drop=6, calibration=calibration))
    out = distill(str(pruned), tmp_path / "out", "smollm2", DistillOptions(steps=40))
    judged = EvalOptions(max_tokens=1024)
    before, after = (evaluate(str(path), "smollm2", judged).kl_mean or 0 for path in (pruned, out))
    assert after < 0.7 * before
