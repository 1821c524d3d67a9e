"""Evaluation against plain formulas, and the pruning and smoothing that it judges."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastattn.compress import (
    CalibrationOptions,
    DistillOptions,
    EvalOptions,
    PruneOptions,
    QuantizeOptions,
    distill,
    evaluate,
    inspect_model,
    prune,
    quantize,
    read_receipt,
)
from fastattn.compress.gptq import output_error
from fastattn.compress.prune import is_two_of_four, layers_to_keep, sparsegpt, wanda_mask
from fastattn.compress.quantize import Quantizer
from fastattn.compress.rewrite import choose_walk
from fastattn.compress.smooth import smooth_layer
from fastattn.compress.text import load_corpus, token_windows
from fastattn.models.loader import ModelSource, open_model
from fastattn.models.registry import load_model
from fastattn.models.weight_formats import make_format
from tests.compress.test_export import GEMMA
from tests.engine.tiny import CONFIG, TinySource, full_logits, make_tokenizer


def logits(source: ModelSource, tokens: list[int]) -> Tensor:
    return full_logits(load_model(source, torch.device("cpu"), torch.float32, 64), tokens)


def test_a_kv_cache_of_8_bits(text: str) -> None:
    """Only the judged model's: against itself that is all the difference, and int8's is the smaller."""
    source = TinySource(config=replace(CONFIG, head_dim=16, softmax_scale=0.0))
    kl = []
    for name in ("auto", "int8", "fp8"):
        result = evaluate(source, source, EvalOptions((text,), 40, 120, kv_cache_dtype=name))
        assert result.kv_cache_dtype == (None if name == "auto" else name)
        kl.append(result.kl_mean)
    assert kl[0] < 1e-6 < kl[1] < kl[2] < 0.1
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp4', allowed are 'auto', 'float32', "):
        EvalOptions(kv_cache_dtype="fp4")


def test_evaluation_is_the_formulas(source: TinySource, text: str) -> None:
    student, options = TinySource(seed=2, config=source.config), EvalOptions((text,), 40, 120)
    result = evaluate(student, source, options)
    windows = token_windows(load_corpus((text,), "evaluation"), source.tokenizer(), 40, 3)
    assert windows.shape == (3, 40) and (windows[:, 0] == 0).all()  # each begins with BOS
    nll, kl, same = [], [], []
    for window in windows.tolist():
        p = logits(source, window)[:-1].double().softmax(-1)
        q = logits(student, window)[:-1].double().softmax(-1)
        nll += [-math.log(q[i, target]) for i, target in enumerate(window[1:])]
        kl += (p * (p / q).log()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert result.num_tokens == len(nll) == 3 * 39
    assert result.nll == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert result.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert result.top1 == sum(same) / len(same)


def test_a_model_is_no_distance_from_itself(source: TinySource, text: str) -> None:
    result = evaluate(source, source, EvalOptions((text,), 40, 120))
    assert result.kl_mean == pytest.approx(0, abs=1e-6) and result.top1 == 1
    assert result.perplexity == result.against_perplexity
    assert "kl_mean" not in evaluate(source, None, EvalOptions((text,), 40, 120)).as_dict()


def test_vocabularies_must_agree(source: TinySource, text: str) -> None:
    with pytest.raises(ValueError, match=r"has 112 tokens, tiny has .* they cannot be compared"):
        evaluate(TinySource(config=replace(source.config, vocab_size=112)), source, EvalOptions((text,), 40, 120))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length is 1, allowed is from 2"),
        ({"max_tokens": 10}, "max_tokens is 10, allowed is from length"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalOptions(**options)


def test_too_long_a_window(source: TinySource, text: str) -> None:
    with pytest.raises(ValueError, match="length is 1024, allowed is up to 512"):
        evaluate(source, None, EvalOptions((text,), 1024, None))


# ---- text ----


def test_the_builtin_text_is_cut_into_two(source: TinySource) -> None:
    learn, judge = load_corpus((), "calibration"), load_corpus((), "evaluation")
    assert len(learn.documents) > 3 * len(judge.documents) > 30
    assert not set(learn.documents) & set(judge.documents)
    assert learn.digest != judge.digest and load_corpus((), "calibration").digest == learn.digest
    windows = token_windows(judge, source.tokenizer(), 64, 5)
    assert windows.shape == (5, 64) and len({tuple(w) for w in windows.tolist()}) == 5


def test_windows_longer_than_the_model_reads(source: TinySource, text: str, tmp_path: Path) -> None:
    for run in (
        lambda: quantize(source, tmp_path / "out", QuantizeOptions(calibration=CalibrationOptions((text,), 1, 513))),
        lambda: prune(source, tmp_path / "out", PruneOptions(calibration=CalibrationOptions((text,), 1, 513))),
        lambda: distill(source, tmp_path / "out", source, DistillOptions((text,), length=513)),
    ):
        with pytest.raises(ValueError, match="length is 513, allowed is up to 512"):
            run()
    quantize(
        source, tmp_path / "out", QuantizeOptions("none", calibration=CalibrationOptions(length=10**9))
    )  # none read
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("hi")
    with pytest.raises(ValueError, match="latin: is not UTF-8 at byte 3"):
        load_corpus((tmp_path / "latin",), "calibration")
    with pytest.raises(ValueError, match="empty: holds no text"):
        load_corpus((tmp_path / "empty",), "calibration")
    with pytest.raises(FileNotFoundError):
        load_corpus((tmp_path / "absent",), "calibration")
    with pytest.raises(ValueError, match="short: has 2 tokens, expected at least a window of 64"):
        token_windows(load_corpus((tmp_path / "short",), "calibration"), make_tokenizer(), 64)


# ---- smoothing ----


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, architecture="qwen2", attention_bias=True), GEMMA])
def test_smoothing_changes_no_output(config: object) -> None:
    source = TinySource(config=config)  # type: ignore[arg-type]
    walk = choose_walk(source, "cpu", 16)
    weights, products = walk.read(0), walk.products(0)
    tokens = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    states = walk.embed(tokens)
    amax = {
        p.path: torch.rand(p.stack(weights).shape[1], generator=torch.Generator().manual_seed(1)) * 50 for p in products
    }
    amax["mlp.down_proj"][3] = 0
    with walk.layer(0) as layer:
        walk.fill(layer, 0, weights)
        before = walk.run(layer, 0, states)
        smooth = dict(weights)
        factors = smooth_layer(smooth, products, amax, source.config, 0.5, lambda name, norm: norm.bfloat16().float())
        walk.fill(layer, 0, smooth)
        torch.testing.assert_close(walk.run(layer, 0, states), before, rtol=1e-4, atol=1e-4)
    assert set(factors) == {p.path for p in products}
    changed = [name for name in weights if not torch.equal(weights[name], smooth[name])]
    assert len(changed) >= 9
    assert all(
        torch.equal(smooth[n], smooth[n].bfloat16().float()) for n in smooth if n.endswith("input_layernorm.weight")
    )


# ---- pruning ----


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_two_of_four(
    method: str, source: TinySource, calibration: CalibrationOptions, text: str, tmp_path: Path
) -> None:
    out = prune(source, tmp_path / "out", PruneOptions(method, calibration=calibration))
    found = inspect_model(str(out), count_zeros=True)
    shares = {group.name: group.sparsity for group in found.groups}
    assert shares["attention"] == shares["feed-forward"] == 0.5 and shares["embeddings"] is None
    sparse = open_model(out)
    for name, info in sparse.tensors().items():
        if "proj" in name:
            values = torch.empty(info.shape)
            sparse.read(name, values)
            assert ((values != 0).view(-1, 4).sum(1) <= 2).all()
    receipt = read_receipt(out) or {}
    assert receipt["method"]["pattern"] == "2:4" and len(receipt["records"]) == 2
    assert ("calibration" in receipt) == (method != "magnitude")  # which reads no text


def test_each_method_is_nearer_than_the_simpler_one() -> None:
    """Where inputs are of different sizes and depend on each other, which is what the methods are for."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    mixed = torch.randn(64, 64, generator=generator) * 0.2 + torch.eye(64)
    sizes = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=generator)]
    inputs = torch.randn(512, 64, generator=generator) @ mixed * sizes
    hessian = inputs.t() @ inputs / len(inputs)
    magnitude = output_error(weight, weight * wanda_mask(weight, torch.ones(64)), hessian)
    wanda = output_error(weight, weight * wanda_mask(weight, hessian.diagonal().sqrt()), hessian)
    assert output_error(weight, sparsegpt(weight, hessian, 0.01), hessian) < wanda * 0.9 < magnitude * 0.8


def test_sparsegpt_is_nearer_than_wanda(
    source: TinySource, calibration: CalibrationOptions, text: str, tmp_path: Path
) -> None:
    kl = {}
    for method in ("wanda", "sparsegpt"):
        out = prune(source, tmp_path / method, PruneOptions(method, calibration=calibration))
        kl[method] = evaluate(str(out), source, EvalOptions((text,), 40, 120)).kl_mean or 0
    assert 0 < kl["sparsegpt"] < kl["wanda"]


@pytest.mark.parametrize(("scheme", "rounding"), [("nvfp4", "gptq"), ("int8", "nearest"), ("int8", "gptq")])
def test_a_sparse_model_stays_sparse_in_fewer_bits(
    scheme: str, rounding: str, source: TinySource, calibration: CalibrationOptions, tmp_path: Path
) -> None:
    pruned = prune(source, tmp_path / "pruned", PruneOptions(calibration=calibration))
    options = QuantizeOptions(scheme=scheme, rounding=rounding, calibration=calibration)
    out = quantize(str(pruned), tmp_path / "out", options)
    stored = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    reader = Quantizer(source.config, torch.float32, make_format(scheme, [32, 64], torch.float32), options)
    matrices = {name: value for name, value in reader.from_stored(stored).items() if "_proj" in name}
    assert len(matrices) == 14 and all(is_two_of_four(value) and value.any() for value in matrices.values())


def test_layers_that_do_least_are_left_out(text: str, tmp_path: Path) -> None:
    """A layer that adds nothing is the first to go, and then the model is the same."""

    class WithIdle(TinySource):
        def read(self, name: str, out: Tensor, shard: object = None, copier: object = None) -> None:
            super().read(name, out, shard)  # type: ignore[arg-type]
            if name in ("model.layers.2.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"):
                out.zero_()

    source = WithIdle(config=replace(CONFIG, num_layers=4, layer_is_sliding=()))
    options = PruneOptions("layers", drop=1, calibration=CalibrationOptions((text,), 4, 32))
    out = prune(source, tmp_path / "out", options)
    receipt = read_receipt(out) or {}
    assert receipt["calibration"]["text"] == "text.txt" and receipt["calibration"]["windows"] == [4, 32]
    assert receipt["layers"] == [0, 1, 3] and receipt["method"]["block_influence"][2] == pytest.approx(0, abs=1e-5)
    assert open_model(out).config == replace(source.config, num_layers=3, layer_is_sliding=(False,) * 3)
    tokens = [0, 5, 9, 33, 70, 41]
    torch.testing.assert_close(logits(open_model(out), tokens), logits(source, tokens))


def test_which_layers_stay() -> None:
    influence = [0.1, 0.5, 0.2, 0.3, 0.05]
    assert layers_to_keep(influence, PruneOptions("layers", drop=2)) == (0, 1, 4)
    assert layers_to_keep(influence, PruneOptions("layers", drop=2, keep_first=0, keep_last=0)) == (1, 2, 3)
    with pytest.raises(ValueError, match="drop is 4, allowed is up to 3"):
        layers_to_keep(influence, PruneOptions("layers", drop=4))


def test_quantized_models_are_not_quantized_again(source: TinySource, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", QuantizeOptions(scheme="mxfp4", rounding="nearest"))
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(str(out), tmp_path / "again", QuantizeOptions(scheme="mxfp4"))
