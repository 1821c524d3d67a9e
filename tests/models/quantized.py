"""Tiny quantized checkpoints, made with the library that defines their format, and the dense models that they stand for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from fastattn.reference import quantize
from tests.models.int4_layouts import TOOL_FORMS, ToolForm

# Blocks of 128 x 128 that hidden_size cuts short, heads and parts for 2 and 3 ranks that they do not.
BLOCK_SIZES = {"hidden_size": 240, "intermediate_size": 384, "head_dim": 128}

VOCAB = 64
# Widths that groups of 32 and 64 divide; 3 KV heads, so that ranks have uneven parts.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Form:
    """A format of compressed-tensors, by the preset it starts from, and what differs from that."""

    preset: str
    format: str
    group_size: int | None = None
    channel: bool = False
    zero_points_of_tokens: bool = False
    ignore: tuple[str, ...] = ("lm_head",)
    sizes: dict[str, int] = field(default_factory=dict)

    def scheme(self) -> QuantizationScheme:
        scheme = preset_name_to_scheme(self.preset, ["Linear"])
        assert scheme.weights is not None
        changes: dict[str, Any] = {} if self.group_size is None else {"group_size": self.group_size}
        if self.channel:
            changes = {"group_size": None, "strategy": "channel"}
        scheme.weights = scheme.weights.model_copy(update=changes)
        if self.zero_points_of_tokens:
            assert scheme.input_activations is not None
            scheme.input_activations = scheme.input_activations.model_copy(update={"symmetric": False})
        return scheme

    def quantization_config(self) -> dict[str, Any]:
        groups = {"group_0": self.scheme()}
        config = QuantizationConfig(
            config_groups=groups, format=self.format, ignore=list(self.ignore), quantization_status="compressed"
        )
        found: dict[str, Any] = config.to_dict()
        return found

    def compress(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A weight as the checkpoint has it, and as it comes out of there."""
        scheme, compressor = self.scheme(), BaseCompressor.get_value_from_registry(self.format)
        args = scheme.weights
        assert args is not None
        if args.strategy == "block":
            return self._compress_blocks(weight)
        group = args.group_size or weight.shape[1]
        groups = weight.unflatten(1, (-1, group))
        low, high = groups.amin(-1), groups.amax(-1)
        if args.strategy == "tensor":
            low, high = weight.amin().view(1), weight.amax().view(1)
        state: dict[str, torch.Tensor] = {"weight": weight}
        if self.preset.startswith("NVFP4"):
            state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
        scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        state["weight_scale"] = scale
        if not args.symmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        stored = compressor.compress(state, scheme)
        dense = compressor.decompress(stored, scheme)["weight"]
        if self.format == "float-quantized":
            dense = stored["weight"].float() * scale
        elif dense.dtype is torch.bfloat16:  # as FP4's are given out; the numbers themselves need more bits
            step = scale / state.get("weight_global_scale", torch.ones(1))
            exact = quantize.unpack_e2m1(stored["weight_packed"]) * quantize.per_column(step, group, weight.shape[1])
            assert torch.equal(exact.bfloat16(), dense)
            dense = exact
        if scheme.input_activations is not None and self.preset == "NVFP4":
            stored["input_global_scale"] = torch.tensor([3.0])
        if self.preset == "FP8":
            stored["input_scale"] = torch.tensor([0.1])
        return {name: t.contiguous() for name, t in stored.items()}, dense

    def _compress_blocks(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        scheme, compressor = self.scheme(), BaseCompressor.get_value_from_registry(self.format)
        codes, scale, _ = in_blocks(weight)
        stored = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        assert torch.equal(stored["weight"].float(), codes.float())
        dense = compressor.decompress(dict(stored), scheme)["weight"].float()
        return {name: t.contiguous() for name, t in stored.items()}, dense


@dataclass(frozen=True)
class BlockForm:
    """FP8 in blocks of 128 x 128, as DeepSeek-V3's and Qwen3's checkpoints have it."""

    sizes: dict[str, int] = field(default_factory=lambda: BLOCK_SIZES)
    ignore: tuple[str, ...] = ("lm_head",)
    preset = "FP8_BLOCK"

    def quantization_config(self) -> dict[str, Any]:
        own = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
        return {"quant_method": "fp8", "modules_to_not_convert": list(self.ignore)} | own

    def compress(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes, scale, dense = in_blocks(weight)
        return {"weight": codes, "weight_scale_inv": scale}, dense


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e4m3, a scale for each block, and the weight that they are; block by block."""
    codes, dense = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scale = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            scale[i, j] = weight[block].abs().amax() / 448 * (1 + i + j)  # no two alike
            codes[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
            dense[block] = codes[block].float() * scale[i, j]
    return codes, scale, dense


FORMS: dict[str, Form | ToolForm | BlockForm] = {
    "int8": Form("W8A8", "int-quantized"),
    "int8 zero points": Form("W8A8", "int-quantized", zero_points_of_tokens=True),
    "fp8": Form("FP8_DYNAMIC", "float-quantized"),
    "fp8 tensor": Form("FP8", "float-quantized"),
    "fp8 blocks": BlockForm(),
    "fp8 blocks of compressed-tensors": Form("FP8_BLOCK", "float-quantized", sizes=BLOCK_SIZES),
    "int4 groups of 32": Form("W4A16", "pack-quantized", 32),
    "int4 zero points": Form("W4A16_ASYM", "pack-quantized", 32),
    "int4 channel": Form("W4A16", "pack-quantized", channel=True),
    "int4 channel zero points": Form("W4A16_ASYM", "pack-quantized", channel=True),
    "nvfp4": Form("NVFP4A16", "nvfp4-pack-quantized"),
    "nvfp4 activations too": Form("NVFP4", "nvfp4-pack-quantized"),
    "mxfp4": Form("MXFP4A16", "mxfp4-pack-quantized"),
    **TOOL_FORMS,
    "k_proj stays": Form("NVFP4A16", "nvfp4-pack-quantized", ignore=("lm_head", "re:.*k_proj$")),
}


def _round_activations(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x = args[0].float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return ((x / scale).round() * scale).to(args[0].dtype)


def _round_activations_with_zero_points(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, form = args[0].float(), FORMS["int8 zero points"]
    assert isinstance(form, Form)
    scale, zero = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), form.scheme().input_activations)
    codes = (x / scale + zero).round().clamp(-128, 127)
    return ((codes - zero) * scale).to(args[0].dtype)


def _round_activations_to_fp8(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x = args[0].float()
    scale = x.abs().amax(-1, keepdim=True) / 448
    return ((x / scale).to(torch.float8_e4m3fn).float() * scale).to(args[0].dtype)


def round_groups_to_fp8(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    groups = [_round_activations_to_fp8(module, (part,)) for part in args[0].split(128, -1)]
    return torch.cat(groups, -1)


# Presets that round activations too.
_ROUNDED = {
    "W8A8": _round_activations,
    "FP8_DYNAMIC": _round_activations_to_fp8,
    "FP8": _round_activations_to_fp8,
    "FP8_BLOCK": round_groups_to_fp8,
}


def write(folder: Path, form: Form | ToolForm | BlockForm, **config: Any) -> LlamaForCausalLM:
    """Writes the checkpoint, and returns transformers' model with the weights that it stands for, fp32."""
    torch.manual_seed(0)
    sizes = {} if isinstance(form, ToolForm) else form.sizes
    model = LlamaForCausalLM(LlamaConfig(**SMALL | sizes | config)).eval().float()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        is_linear = isinstance(model.get_submodule(layer), torch.nn.Linear) and kind == "weight"
        kept = any(re.match(target.removeprefix("re:"), layer) for target in form.ignore)
        if is_linear and not kept:
            stored, dense = form.compress(parameter.detach())
            tensors |= {f"{layer}.{key}": value for key, value in stored.items()}
            parameter.copy_(dense)
            if not isinstance(form, ToolForm) and form.preset in _ROUNDED:
                has_zero_points = isinstance(form, Form) and form.zero_points_of_tokens
                hook = _round_activations_with_zero_points if has_zero_points else _ROUNDED[form.preset]
                model.get_submodule(layer).register_forward_pre_hook(hook)
        else:
            tensors[name] = parameter.clone()
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    raw = model.config.to_dict() | {"quantization_config": form.quantization_config()}
    (folder / "config.json").write_text(json.dumps(raw, default=str))
    vocab = {f"w{i}": i for i in range(VOCAB)}
    Tokenizer(WordLevel(vocab, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return model
