"""Static scales of a KV cache of 8 bits: out of a checkpoint, out of a file, or calibrated in the first step and fixed then; and
what is said and refused where there are none."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn.compress import (
    CalibrationOptions,
    EvalOptions,
    PruneOptions,
    QuantizeOptions,
    evaluate,
    prune,
    quantize,
    read_receipt,
)
from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.kv_scales import choose_kv_cache, load_kv_scales
from fastattn.engine.llm import LLM
from fastattn.engine.memory_plan import PlanOptions, memory_plan
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelFileError, open_model
from fastattn.models.loader.kv_scales import is_kv_scale
from fastattn.models.registry import load_model
from fastattn.nn import TensorParallel
from fastattn.nn.kv_cache import calibrated_scale, check_kv_cache_scales, kv_cache_format
from fastattn.reference.rope import hadamard_product
from fastattn.speculative.config import SpeculativeConfig
from tests.engine import tiny
from tests.engine.test_kv_cache_dtype import CONFIG, GREEDY, PROMPTS, SOURCE, tokens
from tests.engine.thread_ranks import ThreadRanks

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NUM_LAYERS, NUM_KV_HEADS = CONFIG.num_layers, CONFIG.num_kv_heads
LONG = "".join(chr(33 + i * 7 % 90) for i in range(150))  # more tokens than a warning asks for


@pytest.fixture(scope="module")
def network() -> DecoderModel:
    return load_model(SOURCE, CPU, torch.float32, 256)


def scales_of(engine: Engine) -> torch.Tensor:
    found = engine.runner.kv_memory.scales
    assert found is not None
    return found


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    scheme: dict[str, Any] | None = None,
    source: tiny.TinySource = SOURCE,
) -> Path:
    """The tiny model with these tensors too."""
    tiny.write_folder(source, folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)
    if scheme is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def names(style: str) -> list[tuple[str, str]]:
    """Of keys' and values' scales, layer by layer."""
    return [
        tuple(f"model.layers.{i}.self_attn.{style.format(x)}" for x in "kv")  # type: ignore[misc]
        for i in range(NUM_LAYERS)
    ]


STYLES = ["{0}_scale", "attn.{0}_scale", "{0}_proj.{0}_scale", "{0}_proj.output_scale"]
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [(), (1,), (NUM_KV_HEADS, 1, 1)])
def test_a_checkpoints_scales(tmp_path: Path, style: str, shape: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(1)
    tensors = {name: 0.1 + torch.rand(shape, generator=gen) for pair in names(style) for name in pair}
    folder = write(tmp_path, tensors, SCHEME if style == STYLES[0] else None)
    options = {"max_model_len": 64, "max_num_seqs": 2, "quiet": True}
    llm = LLM(str(folder), device="cpu", kv_cache_dtype="fp8", kv_cache_scales="checkpoint", **options)
    expected = torch.stack([torch.stack([tensors[n].flatten().expand(NUM_KV_HEADS) for n in p]) for p in names(style)])
    assert torch.equal(scales_of(llm.engine), expected)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert torch.equal(scales_of(llm.engine), expected)
    for size in (2, 3, 4):
        for rank in range(size):
            tp = TensorParallel(rank, size)
            _, heads = tp.shard_heads(CONFIG.num_heads, NUM_KV_HEADS)
            part = load_kv_scales("checkpoint", "fp8", open_model(folder), tp)
            assert part is not None
            assert torch.equal(part, expected[..., heads.start : heads.start + heads.length])
    # Without the option they are in nobody's way, but where config.json says that the cache is to have them.
    left = LLM(str(folder), device="cpu", **options).engine.runner.kv_memory.scales
    assert (left is not None and torch.equal(left, expected)) if style == STYLES[0] else left is None


@pytest.mark.parametrize("has_scales", [True, False])
def test_auto_is_what_the_checkpoint_was_quantized_for(
    tmp_path: Path, has_scales: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is said explicitly counts more. A scheme without scales leaves fp8 with those of tokens."""
    caplog.set_level(logging.INFO, "fastattn.engine")
    modelopt = {"num_bits": 8, "type": "float", "dynamic": False}
    tensors = {name: torch.tensor(0.25) for pair in names(STYLES[2]) for name in pair} if has_scales else {}
    source = open_model(write(tmp_path, tensors, modelopt))
    for dtype, scales, expected in [
        ("auto", "auto", ("checkpoint" if has_scales else "dynamic", "fp8")),
        ("auto", "dynamic", ("dynamic", "fp8")),
        ("auto", "calculate", ("calculate", "fp8")),
        ("fp8", "auto", ("dynamic", "fp8")),
        ("int8", "auto", ("dynamic", "int8")),
        ("float32", "auto", ("dynamic", "float32")),
    ]:
        assert choose_kv_cache(scales, dtype, source) == expected
    assert "the KV cache is in fp8, as its kv_cache_scheme asks for" in caplog.text
    plain = LLM(source, device="cpu", kv_cache_dtype="float32", max_model_len=64, quiet=True)
    assert plain.engine.runner.kv_memory.values.dtype is torch.float32
    with pytest.raises(
        ValueError, match="kv_cache_dtype is 'bfloat16' for a model in float32, allowed are 'auto', 'float32'"
    ):
        LLM(source, device="cpu", kv_cache_dtype="bfloat16", quiet=True)
    with pytest.raises(ValueError, match="'checkpoint' with kv_cache_dtype 'float32', allowed is 'dynamic' there"):
        choose_kv_cache("checkpoint", "float32", source)
    assert choose_kv_cache("auto", "auto", SOURCE) == ("dynamic", "auto")


def test_compressing_keeps_scales_and_what_they_are_for(tmp_path: Path) -> None:
    """With the layers that stay, under their new numbers; SmoothQuant leaves the values as they are."""
    tensors = {f"model.layers.{i}.self_attn.{x}_scale": torch.tensor(0.25 + i) for i in range(4) for x in "kv"}
    (tmp_path / "in").mkdir()
    deeper = dataclasses.replace(SOURCE, config=dataclasses.replace(CONFIG, num_layers=4, layer_is_sliding=()))
    folder = write(tmp_path / "in", tensors, SCHEME, deeper)
    text = tmp_path / "text.txt"
    text.write_text(LONG * 4)
    calibration = CalibrationOptions((str(text),), samples=2, length=64)
    kept: dict[str, Path] = {
        "int8": quantize(folder, tmp_path / "int8", QuantizeOptions(scheme="int8", dtype="float32", calibration=calibration)),
        "none": quantize(folder, tmp_path / "none", QuantizeOptions(scheme="none")),
        "layers": prune(folder, tmp_path / "layers", PruneOptions("layers", drop=1, calibration=calibration)),
    }  # fmt: skip
    values = {}
    for name, path in {"": folder, **kept}.items():
        source = open_model(path)
        assert source.config.kv_cache_scheme == "fp8"
        found = load_kv_scales("checkpoint", "fp8", source)
        assert found is not None and found.shape == (source.config.num_layers, 2, NUM_KV_HEADS)
        if name == "layers":
            left = (read_receipt(path) or {})["layers"]
            assert len(left) == 3 and found[:, 1, 0].tolist() == [0.25 + i for i in left]
            continue
        assert found[:, 0, 0].tolist() == [0.25, 1.25, 2.25, 3.25]
        llm = LLM(source, device="cpu", kv_cache_dtype="float32", max_model_len=256, num_kv_blocks=16, quiet=True)
        llm.engine.runner.kv_memory.values.zero_()
        llm.generate(LONG, dataclasses.replace(GREEDY, max_tokens=1), use_tqdm=False)
        values[name] = llm.engine.runner.kv_memory.values[:, 1].abs().amax((1, 2))
    for name in ("int8", "none"):
        torch.testing.assert_close(values[name], values[""], rtol=0.25, atol=0.5)


def test_scales_out_of_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "scales.safetensors"
    save_file({name: torch.tensor(0.25) for pair in names(STYLES[0]) for name in pair}, file)
    llm = LLM(SOURCE, device="cpu", kv_cache_dtype="int8", kv_cache_scales=str(file), max_model_len=64, quiet=True)
    assert bool((scales_of(llm.engine) == 0.25).all())
    assert not caplog.records
    save_file({names(STYLES[0])[1][0]: torch.tensor(0.25)}, file)
    with pytest.raises(ValueError, match="3 of 4 scales are missing, which int8 needs"):
        load_kv_scales(str(file), "int8", SOURCE)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model.layers.0.self_attn.k_scale": torch.ones(2)}, r"has shape \(2,\), expected one number or 3, one a KV head"),
        ({"model.layers.0.self_attn.v_scale": torch.tensor(0.0)}, r"is \[0.0\], expected positive numbers"),
        ({"model.layers.0.self_attn.v_scale": torch.tensor(torch.nan)}, r"is \[nan\], expected positive numbers"),
        ({"model.layers.7.self_attn.k_scale": torch.tensor(0.5)}, "but the model has 2 layers"),
        ({"something": torch.tensor(0.5)}, "has no tensor like model.layers.0.self_attn.k_scale"),
    ],
)  # fmt: skip
def test_files_that_are_no_good(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    file = tmp_path / "scales.safetensors"
    save_file(tensors, file)
    with pytest.raises(ModelFileError, match=says):
        load_kv_scales(str(file), "fp8", SOURCE)
    with pytest.raises(ModelFileError, match=r"none\.safetensors: "):
        load_kv_scales(str(tmp_path / "none.safetensors"), "fp8", SOURCE)


def test_ones_by_accident_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(SOURCE, device="cpu", kv_cache_dtype="fp8", kv_cache_scales="checkpoint", max_model_len=64, quiet=True)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert bool((scales_of(llm.engine) == 1).all())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 of the 4 static scales of the KV cache are 1 (tiny)" in record.getMessage()
    assert "use kv_cache_scales='calculate' or 'dynamic'" in record.getMessage()


def make(network: DecoderModel, kv_cache_dtype: str, **options: Any) -> Engine:
    chosen = {"kv_cache_dtype": kv_cache_dtype, "kv_cache_scales": "calculate"} | options
    return tiny.make_engine(network, SOURCE.tokenizer(), **chosen)


@pytest.mark.parametrize(("kv_cache_dtype", "per_amax"), [("fp8", 2 / 448), ("int8", 1.25 / 127)])
@pytest.mark.parametrize("padded", [False, True])
def test_calibrated_on_the_first_step(
    network: DecoderModel, caplog: pytest.LogCaptureFixture, kv_cache_dtype: str, per_amax: float, padded: bool
) -> None:
    """The largest of the first prompt's keys and values, as a cache in fp32 has them, keys mixed, with head room; and then
    fixed."""
    plain = tiny.make_engine(network, SOURCE.tokenizer(), enable_prefix_caching=False)
    plain.runner.kv_memory.values.zero_()
    first = dataclasses.replace(GREEDY, max_tokens=1)
    tiny.run(plain, [LONG], first)
    engine = make(network, kv_cache_dtype, padded=padded)
    tiny.run(engine, [LONG], first)
    kept = plain.runner.kv_memory.values  # (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
    kept[:, 0] = hadamard_product(kept[:, 0])
    expected = kept.abs().amax((2, 3, 5)) * per_amax
    # The layers after the first see their input through rounded keys.
    torch.testing.assert_close(scales_of(engine)[0], expected[0])
    torch.testing.assert_close(scales_of(engine), expected, rtol=0.2, atol=0)
    fixed = scales_of(engine).clone()
    tiny.run(engine, PROMPTS, GREEDY)
    assert torch.equal(scales_of(engine), fixed)
    assert not caplog.records


def test_graphs_come_after_calibration(network: DecoderModel, caplog: pytest.LogCaptureFixture) -> None:
    """A first step that a graph could have is computed without; and few tokens are said to be few."""
    engine, padded = (make(network, "fp8", padded=padded) for padded in (False, True))
    prompt = {"prompt_token_ids": [5]}
    found = [tokens(tiny.run(one, [prompt], GREEDY)) for one in (engine, padded)]  # type: ignore[list-item]
    assert found[0] == found[1]
    assert torch.equal(scales_of(engine), scales_of(padded))
    assert not bool((scales_of(padded) == 1).any())
    assert ["calibrated on 1 tokens only" in record.getMessage() for record in caplog.records] == [True, True]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_calibrate_their_heads(network: DecoderModel, size: int) -> None:
    alone = make(network, "int8", max_num_seqs=6)
    expected = tokens(tiny.run(alone, [LONG, *PROMPTS], GREEDY))
    group = ThreadRanks(SOURCE, size)
    config = EngineConfig(
        max_model_len=256, num_kv_blocks=128, block_size=8, max_num_seqs=6, debug_checks=True, kv_cache_dtype="int8",
        kv_cache_scales="calculate",
    )  # fmt: skip
    engine = group.start(config)
    try:
        assert tokens(tiny.run(engine, [LONG, *PROMPTS], GREEDY)) == expected
        for runner in (engine.runner, *group.runners):
            _, heads = runner.model.tp.shard_heads(CONFIG.num_heads, NUM_KV_HEADS)
            part = scales_of(alone)[..., heads.start : heads.start + heads.length]
            torch.testing.assert_close(runner.kv_memory.scales, part)
    finally:
        group.close()


def test_a_draft_models_scales_are_dynamic(tmp_path: Path) -> None:
    folder = str(tiny.write_folder(SOURCE, tmp_path))
    speculative = SpeculativeConfig(num_speculative_tokens=3, model=folder, adaptive_draft_length=False)
    llm = LLM(
        folder, device="cpu", kv_cache_dtype="int8", kv_cache_scales="calculate", max_model_len=64, num_kv_blocks=32,
        speculative=speculative, quiet=True,
    )  # fmt: skip
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    proposer: Any = llm.engine.speculator.proposer  # type: ignore[union-attr]
    assert proposer.runner.kv_memory.form.has_token_scales
    assert not llm.engine.runner.kv_memory.form.has_token_scales


def test_numbers_that_are_not_finite_do_not_count() -> None:
    seen = torch.tensor([[[1.0, torch.nan], [0.0, 0.0]], [[-3.0, torch.inf], [0.0, 0.0]]])
    torch.testing.assert_close(calibrated_scale(seen, torch.int8), torch.tensor([3 * 1.25 / 127, 1.0]))


def test_keys_are_mixed_but_for_scales_that_come_from_elsewhere() -> None:
    mixes = {
        (name, scales): kv_cache_format(name, torch.bfloat16, 64, scales).mixes_keys
        for name in ("fp8", "int8")
        for scales in ("dynamic", "calculate", "checkpoint", "s.safetensors")
    }
    assert {scales for (_, scales), mixed in mixes.items() if mixed} == {"dynamic", "calculate"}
    assert sum(mixes.values()) == 4
    assert not kv_cache_format("auto", torch.bfloat16, 64).mixes_keys


@pytest.mark.parametrize("scales", ["dynamic", "calculate", "checkpoint"])
def test_what_is_mixed_is_what_is_written(tmp_path: Path, scales: str) -> None:
    """The codes of the first layer's keys, times their scales, are the mixed keys of a cache in fp32, or those as they are."""
    folder = write(tmp_path, {name: torch.tensor(0.05) for pair in names(STYLES[0]) for name in pair}, SCHEME)
    engines = [
        LLM(str(folder), device="cpu", max_model_len=256, quiet=True, enable_prefix_caching=False, num_kv_blocks=32, **options).engine
        for options in ({"kv_cache_dtype": "float32"}, {"kv_cache_dtype": "fp8", "kv_cache_scales": scales})
    ]  # fmt: skip
    keys = []
    for engine in engines:
        memory = engine.runner.kv_memory
        memory.values.zero_()
        tiny.run(engine, [LONG], dataclasses.replace(GREEDY, max_tokens=1))
        codes, scale = memory.values[0, 0].float(), memory.scales
        of_keys = 1.0 if scale is None else scale[0, 0].unsqueeze(-1)
        keys.append(torch.where(codes == 0, 0.0, codes * of_keys))
    plain, rounded = keys
    expected = plain if scales == "checkpoint" else hadamard_product(plain)
    assert bool((plain != 0).any())
    torch.testing.assert_close(rounded, expected, rtol=0.07, atol=0.01)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rounded, hadamard_product(expected), rtol=0.07, atol=0.01)


def test_memory_plan() -> None:
    plans = [
        memory_plan(CONFIG, {}, PlanOptions("cpu", torch.float32, 256, 16, 64, 8, "fp8", scales), 1 << 30, 1 << 30)
        for scales in ("dynamic", "checkpoint", "calculate")
    ]
    dynamic, static, calculated = plans
    assert dynamic.kv_bytes_per_token - static.kv_bytes_per_token == NUM_LAYERS * 2 * NUM_KV_HEADS * 4
    assert static.buffer_bytes - dynamic.buffer_bytes == NUM_LAYERS * 2 * NUM_KV_HEADS * 4
    assert calculated.activation_bytes >= static.activation_bytes


@pytest.mark.parametrize(
    ("scales", "dtype", "says"),
    [
        ("perhaps", "fp8", "kv_cache_scales is 'perhaps', allowed are 'dynamic', 'checkpoint', 'calculate' and a file's name"),
        ("calculate", "auto", "kv_cache_scales is 'calculate' with kv_cache_dtype 'auto', allowed is 'dynamic' there"),
        ("s.safetensors", "int8_per_token_head", "with kv_cache_dtype 'int8_per_token_head', allowed is 'dynamic' there"),
        ("dynamic", "fp4", "kv_cache_dtype is 'fp4', allowed are"),
    ],
)  # fmt: skip
def test_what_is_refused(scales: str, dtype: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_kv_cache_scales(scales, dtype)


def test_scales_for_other_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allowed are 'dynamic' and 'calculate': tiny has no scales"):
        LLM(SOURCE, device="cpu", kv_cache_dtype="int8", kv_cache_scales="checkpoint", quiet=True)
    folder = write(tmp_path, {name: torch.tensor(0.5) for pair in names(STYLES[0]) for name in pair}, SCHEME)
    with pytest.raises(ValueError, match="with kv_cache_dtype 'int8', allowed is 'fp8'"):
        LLM(str(folder), device="cpu", kv_cache_dtype="int8", kv_cache_scales="checkpoint", quiet=True)


def test_names_of_scales() -> None:
    assert all(is_kv_scale(f"model.layers.3.self_attn.{style.format(x)}") for style in STYLES for x in "qkv")
    others = ("k_proj.weight_scale", "k_proj.v_scale", "k_proj.weight", "o_proj.output_scale", "k_scale.x")
    assert not any(is_kv_scale(f"model.layers.3.self_attn.{name}") for name in others)


def test_evaluation_calibrates_on_its_first_window(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(LONG)
    kl = {}
    for scales in ("dynamic", "calculate"):
        result = evaluate(SOURCE, SOURCE, EvalOptions((str(text),), 40, 120, "cpu", kv_cache_dtype="int8", kv_cache_scales=scales))  # fmt: skip
        assert result.kv_cache_scales == scales
        kl[scales] = result.kl_mean
    assert kl["dynamic"] is not None and kl["calculate"] is not None
    assert 0 < kl["dynamic"] < kl["calculate"] < 0.1
