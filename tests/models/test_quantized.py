"""Quantized checkpoints load and compute what the dense model that they stand for computes; damage and strangers are refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn import LLM, SamplingParams, nn
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import open_model
from fastattn.models.quantization import kv_cache_scheme_from_hf, quantization_from_hf
from fastattn.models.registry import build_meta, load_model, loaded_bytes
from fastattn.nn.fp4 import Fp4Weight
from tests.engine.tiny import full_logits
from tests.models.quantized import FORMS, SMALL, Form, round_groups_to_fp8, write

ONE_OF_EACH = (
    "int8",
    "int8 zero points",
    "fp8",
    "fp8 tensor",
    "fp8 blocks",
    "int4 zero points",
    "gptq zero points",
    "awq",
    "nvfp4",
    "mxfp4",
    "k_proj stays",
)
IDS = [1, 5, 9, 33, 2, 61, 17, 8, 40, 40, 3]
CPU = torch.device("cpu")


def load(
    folder: Path, dtype: torch.dtype = torch.float32, unpacked: bool = False, tp: nn.TensorParallel = nn.ALONE
) -> DecoderModel:
    """unpacked: as on a GPU, with the weights as they are stored; the operators' CPU implementations compute."""
    with pytest.MonkeyPatch.context() as patch:
        if unpacked:
            patch.setattr(nn.QuantizedWeight, "pack", lambda self: None)
        return load_model(open_model(folder), CPU, dtype, 64, tp=tp)


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    """In fp32, packed for the CPU and as stored. A tie between two codes of an activation may go either way: with INT8, and among
    the many of the models with blocks."""
    dense = write(tmp_path, FORMS[name])
    with torch.no_grad():
        expected = dense(torch.tensor([IDS])).logits[0]
    for unpacked in (False, True):
        model = load(tmp_path, unpacked=unpacked)
        assert sum(layer.quantized is not None for _, layer in model.linears()) == (6 if "stays" in name else 8)
        error = float((full_logits(model, IDS) - expected).abs().max() / expected.std())
        assert error < (2e-2 if "int8" in name else 0.1 if "blocks" in name else 1e-4), error


def test_layers_in_blocks(tmp_path: Path) -> None:
    """Of one rounding each, so that sums may be compared closely."""
    dense = write(tmp_path, FORMS["fp8 blocks"])
    for unpacked in (False, True):
        for name, layer in load(tmp_path, unpacked=unpacked).linears():
            for piece in layer.pieces(name) if name != "lm_head" else ():
                weight = dense.get_submodule(piece.name).weight
                x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
                expected = round_groups_to_fp8(dense, (x,)) @ weight.detach().t()
                product = (
                    nn.MergedLinear.forward(layer, x) if isinstance(layer, nn.MergedLinear) else layer(x)
                )  # not activated
                torch.testing.assert_close(product[:, piece.rows], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8 blocks", "int4 zero points", "nvfp4", "mxfp4"])
def test_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """At most three times the error that transformers makes with the same weights in that type."""
    dense = write(tmp_path, FORMS[name])
    with torch.no_grad():
        expected = dense(torch.tensor([IDS])).logits[0]
        plain = dense.to(dtype)(torch.tensor([IDS])).logits[0].float()
    allowed = 3 * float((plain - expected).abs().max())
    for unpacked in (False, True):
        model = load(tmp_path, dtype, unpacked)
        assert float((full_logits(model, IDS) - expected).abs().max()) <= allowed


def test_scales_keep_their_types(tmp_path: Path) -> None:
    """A model in bf16 has the fp32 scales that were stored, not rounded ones."""
    for name in ("int8", "nvfp4"):
        write(tmp_path / name, FORMS[name])
        stored = load_file(tmp_path / name / "model.safetensors")
        layer = dict(load(tmp_path / name, torch.bfloat16, unpacked=True).linears())["model.layers.1.mlp.gate_up_proj"]
        key = "scale" if name == "int8" else "global_scale"
        own = getattr(layer.quantized, key)[SMALL["intermediate_size"] :]
        suffix = "weight_scale" if name == "int8" else "weight_global_scale"
        theirs = stored[f"model.layers.1.mlp.up_proj.{suffix}"].view(-1)
        assert own.dtype is torch.float32 and torch.equal(own, theirs.expand_as(own))


def test_engine_generates(tmp_path: Path) -> None:
    """The whole way from the folder to tokens; greedy ones are those of the dense model."""
    dense = write(tmp_path, FORMS["int4 zero points"])
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", max_model_len=64, quiet=True)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": IDS}], params, use_tqdm=False)[0]
    with torch.no_grad():
        ids = torch.tensor([IDS])
        for _ in range(12):
            ids = torch.cat([ids, dense(ids).logits[0, -1].argmax().view(1, 1)], 1)
    assert output.outputs[0].token_ids == ids[0, len(IDS) :].tolist()


def test_pruned_models_are_dense(tmp_path: Path) -> None:
    """Two of four weights are zeros, stored as the numbers they are; older versions of the library wrote that into the config."""
    model = write(tmp_path, Form("W8A8", "int-quantized", ignore=("re:.*",)))
    tensors = load_file(tmp_path / "model.safetensors")
    for name, t in tensors.items():
        if name.endswith("proj.weight"):
            t.view(-1, 4)[:, :2] = 0
            model.state_dict()[name].copy_(t)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(
        tmp_path,
        lambda q: q | {"config_groups": {}, "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}},
    )
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(full_logits(load(tmp_path), IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "int4 channel", "gptq ordered"])
def test_planned_memory_is_what_is_taken(name: str, tmp_path: Path) -> None:
    dense = write(tmp_path, FORMS[name])
    meta = build_meta(open_model(tmp_path).config, 8)
    assert meta.num_parameters == sum(p.numel() for p in dense.parameters())
    for unpacked, device_type in ((True, "cuda"), (False, "cpu")):
        model = load(tmp_path, torch.bfloat16, unpacked)
        for module in model.modules():
            if isinstance(module, Fp4Weight) and module.is_relative_on(device_type):
                module.make_relative()  # as `pack` does there
        taken: dict[torch.dtype, int] = {}
        packed = [t for m in model.modules() if isinstance(m, nn.QuantizedWeight) for t in m.packed or ()]
        for t in (*model.parameters(), *packed):
            taken[t.dtype] = taken.get(t.dtype, 0) + t.numel() * t.itemsize
        assert {k: n for k, n in taken.items() if n} == loaded_bytes(meta, torch.bfloat16, device_type)


def test_activations_that_stay_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, FORMS["nvfp4 activations too"])
    with caplog.at_level(logging.WARNING, "fastattn.models"):
        load(tmp_path)
    assert "activations stay in 16 bits" in caplog.text and "NVFP4" in caplog.text


# --- ranks


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "int4 channel zero points", "gptq rows"])
def test_ranks_have_the_parts_of_the_whole(name: str, size: int, tmp_path: Path) -> None:
    """The dense values of all ranks' parts, put together, are those of the model on one rank. 3 KV heads on 2 ranks are uneven."""
    write(tmp_path, FORMS[name])
    whole = dict(load(tmp_path, unpacked=True).linears())
    ranks = [dict(load(tmp_path, unpacked=True, tp=nn.TensorParallel(r, size)).linears()) for r in range(size)]
    for layer_name, layer in whole.items():
        for index, part in enumerate(leaves(layer)):
            dim = part.shard.dim
            parts = [dense_value(leaves(rank[layer_name])[index]) for rank in ranks]
            if isinstance(part, nn.MergedLinear):
                pieces = [
                    torch.cat([p[piece.rows] for p, piece in zip(parts, own, strict=True)])
                    for own in zip(*(rank[layer_name].pieces("") for rank in ranks), strict=True)
                ]
                together = torch.cat(pieces)
            else:
                together = torch.cat(parts, dim)
            assert torch.equal(together, dense_value(part)), layer_name


def leaves(layer: nn.Linear) -> list[nn.Linear]:
    separate = getattr(layer, "separate", None)
    return [layer] if separate is None else list(separate)


def dense_value(layer: nn.Linear) -> torch.Tensor:
    if layer.quantized is None:
        return layer.weight
    value = torch.cat(layer.quantized.dense_parts(), 1)
    scale = getattr(layer.quantized, "global_scale", None)
    return value if scale is None else value / scale[:, None]


def test_parts_that_would_cut_blocks_stay_apart(tmp_path: Path) -> None:
    """192 rows of q are a block and a half: k cannot lie behind them. On two ranks the second one's would begin within a block."""
    dense = write(tmp_path, FORMS["fp8 blocks"], **SMALL)
    with torch.no_grad():
        expected = dense(torch.tensor([IDS])).logits[0]
    for unpacked in (False, True):
        model = load(tmp_path, unpacked=unpacked)
        assert all(len(leaves(layer)) == (3 if "qkv" in name else 2) for name, layer in model.linears() if "_up" in name or "qkv" in name)  # fmt: skip
        assert float((full_logits(model, IDS) - expected).abs().max() / expected.std()) < 1e-4
    says = r"self_attn\.q_proj: this rank's part is 0 to 64 of 192, expected multiples of 128 rows, a block"
    with pytest.raises(ValueError, match=says):
        load(tmp_path, tp=nn.TensorParallel(0, 3))


def test_columns_in_an_order_are_not_cut(tmp_path: Path) -> None:
    write(tmp_path, FORMS["gptq ordered"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj: its columns are in the order of g_idx"):
        load(tmp_path, tp=nn.TensorParallel(0, 3))


def test_cuts_within_a_group_are_refused(tmp_path: Path) -> None:
    write(tmp_path, FORMS["int4 groups of 32"], num_key_value_heads=6, head_dim=16)
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.self_attn\.o_proj: this rank's part is 0 to 48 of 96, expected "
        r"multiples of 32 columns, a group; allowed is a tensor_parallel_size that cuts there",
    ):
        load(tmp_path, tp=nn.TensorParallel(0, 2))


# --- damage


def edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"] = change(raw["quantization_config"])
    path.write_text(json.dumps(raw))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "suffix", "damage", "says"),
    [
        ("int8", "weight_scale", None, "1 tensors are missing, first '{name}'"),
        ("int8", "weight", lambda t: t.float(), "{name} is stored as F32, expected I8"),
        ("fp8", "weight", lambda t: t.float(), "{name} is stored as F32, expected F8_E4M3"),
        ("int8", "weight_scale", lambda t: t[:, 0], "{name} has shape (96,), expected (96, 1)"),
        ("int8", "weight_scale", lambda t: t.to(torch.int32), "{name} is stored as I32, expected F32 or F16 or BF16"),
        ("int4 groups of 32", "weight_shape", lambda t: t - 1, "{name} is [95, 191], expected [96, 192]"),
        ("int4 groups of 32", "weight_packed", lambda t: t[:, :-1], "{name} has shape (96, 23), expected (96, 24)"),
        ("int4 groups of 32", "weight_scale", lambda t: t[:, ::2], "{name} has shape (96, 3), expected (96, 6)"),
        ("int4 zero points", "weight_zero_point", None, "1 tensors are missing, first '{name}'"),
        ("nvfp4", "weight_global_scale", None, "1 tensors are missing, first '{name}'"),
        ("nvfp4", "weight_global_scale", lambda t: t * 0, "{name} is 0.0, expected a finite number above 0"),
        ("nvfp4", "weight_global_scale", lambda t: t / 0, "{name} is inf, expected a finite number above 0"),
        ("nvfp4", "weight_scale", lambda t: t.view(torch.uint8), "{name} is stored as U8, expected F8_E4M3"),
        ("nvfp4", "weight_packed", lambda t: t.to(torch.int8), "{name} is stored as I8, expected U8"),
        ("mxfp4", "weight_scale", lambda t: t.float(), "{name} is stored as F32, expected U8 or F8_E8M0"),
        ("fp8 tensor", "weight_scale", lambda t: -t, "expected a finite number above 0"),
        ("fp8 blocks", "weight_scale_inv", None, "1 tensors are missing, first '{name}'"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t[:, :2], "{name} has shape (2, 2), expected (2, 3)"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t / 0, "{name} has inf, expected finite numbers above 0"),
        ("gptq", "g_idx", lambda t: t.flip(0), "{name} is not in order, expected column / group_size without desc_act"),
        ("gptq", "qzeros", lambda t: t + 1, "{name} has zero points other than 8"),
        ("gptq", "qweight", lambda t: t.t(), "{name} has shape (96, 24), expected (24, 96)"),
        ("gptq ordered", "g_idx", lambda t: t * 0, "{name} does not give each group 32 columns"),
        ("awq", "scales", None, "1 tensors are missing, first '{name}'"),
    ],
)
def test_damage_is_named(
    name: str, suffix: str, damage: Callable[[torch.Tensor], torch.Tensor] | None, says: str, tmp_path: Path
) -> None:
    write(tmp_path, FORMS[name])
    tensor = f"{LAYER}.{suffix}"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        stored = tensors.pop(tensor)
        if damage is not None:
            tensors[tensor] = damage(stored).contiguous()

    edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=re.escape(says.format(name=tensor))):
        load(tmp_path)


def test_codes_are_no_dense_weight(tmp_path: Path) -> None:
    write(tmp_path, Form("W8A8", "int-quantized", ignore=("re:.*",)))
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(96, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8, expected a float type"):
        load(tmp_path)


def test_a_config_without_its_layers(tmp_path: Path) -> None:
    """A layer that the config leaves out, but the file has packed."""
    write(tmp_path, FORMS["nvfp4"])
    edit_config(tmp_path, lambda q: q | {"ignore": ["lm_head", LAYER]})
    with pytest.raises(ValueError, match=rf"1 tensors are missing, first '{re.escape(LAYER)}\.weight'"):
        load(tmp_path)


def test_scales_in_e8m0s_own_type(tmp_path: Path) -> None:
    write(tmp_path, FORMS["mxfp4"])
    before = full_logits(load(tmp_path), IDS)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    edit_tensors(tmp_path, change)
    assert torch.equal(full_logits(load(tmp_path), IDS), before)


# --- configurations

WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
TOKENS: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def config(form: str = "int-quantized", weights: Any = WEIGHTS, inputs: Any = TOKENS, **other: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    base = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return {"quantization_config": base | other}


def tool(method: str, **other: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": 4, "group_size": 128} | other}


BLOCKS = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
}


def test_layers_that_stay_beside_fp8_blocks() -> None:
    """Named by whole parts of their names, as transformers has it; the head always."""
    kept = ["model.layers.1", "mlp.gate_proj"]
    found = quantization_from_hf({"quantization_config": BLOCKS | {"modules_to_not_convert": kept}})
    assert found is not None
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.7.mlp.gate_proj", "lm_head"):
        assert found.scheme(name) is None
    for name in ("model.layers.10.self_attn.q_proj", "model.layers.7.mlp.up_proj"):
        assert found.scheme(name) == nn.Fp8BlockScheme()
    assert str(found) == "FP8 (W8A8), blocks of 128 x 128"


def test_layers_that_awq_keeps() -> None:
    """Named by any part of their name, as AutoAWQ does."""
    found = quantization_from_hf(tool("awq", modules_to_not_convert=["self_attn.v_proj"], version="GEMM"))
    assert found is not None
    assert found.scheme("model.layers.7.self_attn.v_proj") is found.scheme("lm_head") is None
    assert found.scheme("model.layers.7.self_attn.q_proj") == nn.AwqScheme(128, False)


@pytest.mark.parametrize(("form", "group_size"), [("nvfp4-pack-quantized", 16), ("mxfp4-pack-quantized", 32)])
def test_activations_of_fp4_weights(form: str, group_size: int) -> None:
    """In fp8 a token they are rounded; in 4 bits they are not, and a note says so."""
    weights = {"num_bits": 4, "type": "float", "group_size": group_size, "strategy": "group", "symmetric": True}
    for inputs, fp8 in ((None, False), (TOKENS | {"type": "float"}, True), (TOKENS | {"num_bits": 4}, False)):
        found = quantization_from_hf(config(form, weights, inputs))
        assert found is not None
        assert found.scheme("model.layers.0.mlp.up_proj") == nn.Fp4Scheme(group_size, fp8)
        assert bool(found.notes) == (inputs is not None and not fp8)
        assert str(found).endswith("(W4A8)" if fp8 else "(W4A16)")


def test_zero_points_of_activations() -> None:
    """Unless the file says that they are symmetric, in so many words."""
    for inputs, symmetric in ((TOKENS, True), (TOKENS | {"symmetric": False}, False)):
        found = quantization_from_hf(config(inputs=inputs))
        assert found is not None
        assert found.scheme("model.layers.0.mlp.up_proj") == nn.Int8Scheme(symmetric)
        assert str(found) == "INT8 (W8A8)" + ("" if symmetric else ", zero points of activations")


def test_targets() -> None:
    """A name counts more than a pattern, a pattern more than a class; ignore counts most."""
    base = config()["quantization_config"]
    four = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}
    base["config_groups"] |= {
        "group_1": {"targets": ["re:.*mlp.*"], "weights": four, "format": "nvfp4-pack-quantized"},
        "group_2": {
            "targets": ["model.layers.1.mlp.up_proj"],
            "weights": four | {"group_size": 32, "strategy": "group"},
            "format": "mxfp4-pack-quantized",
        },
    }
    found = quantization_from_hf({"quantization_config": base | {"ignore": ["lm_head", "re:.*layers\\.0\\."]}})
    assert found is not None
    assert found.scheme("model.layers.1.self_attn.q_proj") == nn.Int8Scheme()
    assert found.scheme("model.layers.1.mlp.gate_proj") == nn.Fp4Scheme(16)
    assert found.scheme("model.layers.1.mlp.up_proj") == nn.Fp4Scheme(32)
    assert found.scheme("model.layers.0.mlp.up_proj") is None
    assert found.scheme("lm_head") is None
    assert str(found) == "INT8 (W8A8), NVFP4 (W4A16), MXFP4 (W4A16)"


@pytest.mark.parametrize("kind", ["float", "int"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_kv_cache_schemes(kind: str, strategy: str) -> None:
    """Of a checkpoint whose weights are quantized or not; anything but static scales of heads is refused."""
    scheme = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    for raw in (config(kv_cache_scheme=scheme), config(kv_cache_scheme=scheme, config_groups={})):
        assert kv_cache_scheme_from_hf(raw) == ("fp8" if kind == "float" else "int8")
        quantization_from_hf(raw)
    for change in ({"num_bits": 4}, {"symmetric": False}, {"dynamic": True}, {"strategy": "channel"}, {"type": "x"}):
        with pytest.raises(ValueError, match=r"kv_cache_scheme is \{.*supported are 8 bits of type 'float' or 'int'"):
            kv_cache_scheme_from_hf(config(kv_cache_scheme=scheme | change))
    assert kv_cache_scheme_from_hf({}) is kv_cache_scheme_from_hf(config()) is None


def test_not_quantized() -> None:
    assert quantization_from_hf({}) is None
    assert quantization_from_hf({"quantization_config": None}) is None
    assert quantization_from_hf(config(config_groups={})) is None


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"quantization_config": 3}, "quantization_config is 3, expected an object"),
        (
            config(quant_method="bitsandbytes"),
            "quant_method is 'bitsandbytes', supported are 'compressed-tensors', 'gptq', 'awq', 'fp8'",
        ),
        (tool("gptq", bits=8), "bits is 8, supported is 4 (gptq)"),
        (tool("gptq", group_size=0), "group_size is 0, expected a positive number or -1 (gptq)"),
        (tool("gptq", checkpoint_format="marlin"), "checkpoint_format is 'marlin', supported are 'gptq' and 'gptq_v2'"),
        (tool("gptq", dynamic={"-:.*": {}}), "dynamic is {'-:.*': {}}"),
        (tool("gptq", sym="yes"), "sym is 'yes', expected true or false"),
        (tool("awq", version="gemv"), "version is 'gemv', supported is 'gemm' (awq)"),
        (tool("awq", zero_point=False), "zero_point is False, supported is True (awq)"),
        (
            tool("awq", modules_to_not_convert="lm_head"),
            "modules_to_not_convert is 'lm_head', expected a list of strings",
        ),
        (
            {"quantization_config": BLOCKS | {"weight_block_size": [64, 128]}},
            "weight_block_size is [64, 128], supported is [128, 128] (fp8)",
        ),
        (
            {"quantization_config": BLOCKS | {"weight_block_size": None}},
            "weight_block_size is None, supported is [128, 128] (fp8)",
        ),
        (
            {"quantization_config": BLOCKS | {"activation_scheme": "static"}},
            "activation_scheme is 'static', supported is 'dynamic' (fp8)",
        ),
        ({"quantization_config": BLOCKS | {"fmt": "e5m2"}}, "fmt is 'e5m2', supported is 'e4m3' (fp8)"),
        (config(quant_method=None), "quant_method is None"),
        (config(quant_method=["gptq"]), "quant_method is ['gptq'], supported are"),
        (config(quantization_status="frozen"), "quantization_status is 'frozen', supported is 'compressed'"),
        (config(transform_config={"x": 1}), "transform_config, which is not supported"),
        (config(sparsity_config={"format": "sparse-24-bitmask"}), "format 'sparse-24-bitmask', supported is 'dense'"),
        (config(config_groups=[1]), "config_groups is [1], expected an object"),
        (config(config_groups={"W8A8": ["Linear"]}), "config_groups has 'W8A8': ['Linear'], expected an object"),
        (config(ignore="lm_head"), "ignore is 'lm_head', expected a list of strings"),
        (config(ignore=["re:("]), "ignore has the pattern '('"),
        (config(ignore=["re:(a+)+$"]), "allowed are 6 repetitions, none of a group"),
        (config(ignore=["re:" + "a*" * 20]), "allowed are 6 repetitions"),
        (
            config("float-quantized", WEIGHTS | {"type": "float"}),
            "'group_0' is 'float-quantized' with weights of num_bits 8",
        ),
        (config(weights=WEIGHTS | {"strategy": "tensor"}), "strategy 'tensor'"),
        (config(weights=WEIGHTS | {"symmetric": False}), "symmetric False"),
        (config(inputs=TOKENS | {"dynamic": False}), "8-bit int token activations; supported are int-quantized"),
        (config(inputs=TOKENS | {"symmetric": "no"}), "8-bit int token activations; supported are int-quantized"),
        (config(inputs=None), "16-bit activations; supported are"),
        (config(weights=None), "has weights None"),
        (
            config("pack-quantized", WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": 128}),
            "8-bit int token",
        ),
        (config("pack-quantized", WEIGHTS | {"actorder": "group"}, None), "actorder 'group'"),
        (config("pack-quantized", WEIGHTS, None), "num_bits 8"),
        (config("marlin-24", WEIGHTS | {"num_bits": 4}, None), "'marlin-24'"),
    ],
)
def test_what_we_do_not_run_is_named(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        quantization_from_hf(raw)
