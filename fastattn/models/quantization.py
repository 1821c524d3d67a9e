"""Which layers of a checkpoint have weights of few bits, and how they are stored: `quantization_config` of a config.json, in the form
of compressed-tensors, of GPTQ's tools (AutoGPTQ, GPTQModel), of AWQ's (AutoAWQ) or of DeepSeek-V3's FP8. What we do not run is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.nn import AwqScheme, Fp4Scheme, Fp8BlockScheme, Fp8Scheme, GptqScheme, Int4Scheme, Int8Scheme, Scheme

_SUPPORTED = (
    "int-quantized (INT8 weights a channel, activations alike a token, dynamic, symmetric or not), float-quantized (FP8 weights a channel or a tensor, "
    "activations alike, or blocks of 128 x 128 with activations by 128 columns, dynamic), pack-quantized (INT4 weights, groups or channels), nvfp4-pack-quantized and mxfp4-pack-quantized "
    "(activations in 16 bits, or FP8 a token, dynamic)"
)


@dataclass(frozen=True)
class QuantizationConfig:
    """groups: (targets, scheme), a target being a layer's name, "re:" and a pattern for its beginning, or the class "Linear".
    ignore: targets that stay as they are. unused: endings of tensors that the checkpoint has and we do not need.
    notes: what we do otherwise than the checkpoint says."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def scheme(self, name: str) -> Scheme | None:
        """How the weight of the linear layer ``name`` is stored. A name counts more than a pattern, a pattern more than a class."""
        if any(_matches(target, name) for target in self.ignore):
            return None
        for kind in (_is_name, _is_pattern, _is_class):
            for targets, scheme in self.groups:
                if any(kind(target) and _matches(target, name) for target in targets):
                    return scheme
        return None

    def __str__(self) -> str:
        return ", ".join(dict.fromkeys(str(scheme) for _, scheme in self.groups))


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_class(target: str) -> bool:
    return target == "Linear"


def _is_name(target: str) -> bool:
    return not _is_pattern(target) and not _is_class(target)


def _matches(target: str, name: str) -> bool:
    if _is_pattern(target):
        return re.match(target[3:], name) is not None
    return _is_class(target) or target == name


def quantization_from_hf(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    """From the contents of a config.json; None for a model that is not quantized."""
    config = raw.get("quantization_config", raw.get("compression_config"))
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json: quantization_config is {config!r}, expected an object")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"config.json: quant_method is {method!r}, supported are {', '.join(map(repr, _METHODS))}")
    return _METHODS[method](config)


def _compressed_tensors(config: Mapping[str, Any]) -> QuantizationConfig | None:
    _check_rest(config)
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise ValueError(f"config.json: config_groups is {groups!r}, expected an object")
    if not groups:
        return None
    parsed, unused, notes = [], [], []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"config.json: config_groups has {name!r}: {group!r}, expected an object")
        targets = _targets(f"targets of {name!r}", group.get("targets"))
        scheme = _scheme(name, group, group.get("format") or config.get("format"))
        parsed.append((targets, scheme))
        if isinstance(scheme, Fp4Scheme) and not scheme.fp8_activations and group.get("input_activations") is not None:
            unused.append(".input_global_scale")
            notes.append(f"activations stay in 16 bits, where the checkpoint would round them to 4 ({name}, {scheme})")
        if isinstance(scheme, Fp8Scheme) and group["input_activations"].get("strategy") == "tensor":
            unused.append(".input_scale")
            notes.append(f"activations have a scale a token, where the checkpoint has one for all ({name}, {scheme})")
    ignore = _targets("ignore", config.get("ignore") or [])
    return QuantizationConfig(tuple(parsed), ignore, tuple(unused), tuple(notes))


def _gptq(config: Mapping[str, Any]) -> QuantizationConfig:
    group_size = _int4_groups("gptq", config)
    symmetric, ordered = _flag(config, "sym", True), _flag(config, "desc_act", False)
    form = config.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        raise ValueError(f"config.json: checkpoint_format is {form!r}, supported are 'gptq' and 'gptq_v2' (gptq)")
    for name in ("dynamic", "modules_in_block_to_quantize", "modules_to_not_convert"):
        if config.get(name):
            raise ValueError(
                f"config.json: {name} is {config[name]!r}, supported are models of one kind of layer (gptq)"
            )
    scheme = GptqScheme(
        group_size, symmetric, zero_minus_one=form == "gptq", ordered=ordered and group_size is not None
    )
    return QuantizationConfig(((("Linear",), scheme),), () if _flag(config, "lm_head", False) else ("lm_head",))


def _awq(config: Mapping[str, Any]) -> QuantizationConfig:
    group_size = _int4_groups("awq", config)
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise ValueError(f"config.json: version is {version!r}, supported is 'gemm' (awq)")
    if not _flag(config, "zero_point", True):
        raise ValueError("config.json: zero_point is False, supported is True (awq)")
    kept = _targets("modules_to_not_convert", config.get("modules_to_not_convert") or [])
    ignore = [f"re:.*{re.escape(part)}" for part in kept]  # AutoAWQ looks for them anywhere in a name
    return QuantizationConfig(((("Linear",), AwqScheme(group_size, False)),), (*ignore, "lm_head"))


def _fp8(config: Mapping[str, Any]) -> QuantizationConfig:
    for name, supported in (("weight_block_size", [128, 128]), ("activation_scheme", "dynamic"), ("fmt", "e4m3")):
        found = config.get(name, "e4m3" if name == "fmt" else None)
        if found != supported:
            raise ValueError(f"config.json: {name} is {found!r}, supported is {supported!r} (fp8)")
    kept = _targets("modules_to_not_convert", config.get("modules_to_not_convert") or [])
    ignore = [rf"re:(.*\.)?{re.escape(part)}(\.|$)" for part in kept]  # whole parts of a name, as transformers has it
    return QuantizationConfig(((("Linear",), Fp8BlockScheme()),), (*ignore, "lm_head"))


def _int4_groups(method: str, config: Mapping[str, Any]) -> int | None:
    """Columns to a group, None for all of a row, of weights that must be of 4 bits."""
    bits, group_size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits != 4:
        raise ValueError(f"config.json: bits is {bits!r}, supported is 4 ({method})")
    if group_size == -1:
        return None
    if not isinstance(group_size, int) or not 1 <= group_size < 2**31:
        raise ValueError(f"config.json: group_size is {group_size!r}, expected a positive number or -1 ({method})")
    return group_size


def _flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name} is {value!r}, expected true or false")
    return value


_METHODS: dict[str, Callable[[Mapping[str, Any]], QuantizationConfig | None]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}


def kv_cache_scheme_from_hf(raw: Mapping[str, Any]) -> str | None:
    """For a KV cache of which dtype, "fp8" or "int8", a config.json says that the checkpoint has static scales; None if it says
    nothing."""
    config = raw.get("quantization_config", raw.get("compression_config"))
    scheme = config.get("kv_cache_scheme") if isinstance(config, Mapping) else None
    if scheme is None:
        return None
    if isinstance(scheme, Mapping):
        values = (scheme.get("num_bits"), scheme.get("symmetric", True), scheme.get("dynamic", False))
        kind = {"float": "fp8", "int": "int8"}.get(str(scheme.get("type")))
        if (
            kind is not None
            and values == (8, True, False)
            and scheme.get("strategy", "tensor") in ("tensor", "attn_head")
        ):
            return kind
    raise ValueError(
        f"config.json: kv_cache_scheme is {scheme!r}, supported are 8 bits of type 'float' or 'int', symmetric, not dynamic, "
        "with strategy 'tensor' or 'attn_head'"
    )


def _check_rest(config: Mapping[str, Any]) -> None:
    """What may stand beside the groups and would change the numbers."""
    status = config.get("quantization_status", "compressed")
    if status != "compressed":
        raise ValueError(f"config.json: quantization_status is {status!r}, supported is 'compressed'")
    if config.get("transform_config"):
        raise ValueError("config.json: quantization_config has a transform_config, which is not supported")
    sparsity = config.get("sparsity_config") or {}
    form = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
    if form != "dense":
        raise ValueError(
            f"config.json: sparsity_config has format {form!r}, supported is 'dense': zeros stored as the numbers they are"
        )


def _targets(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise ValueError(f"config.json: {what} is {value!r}, expected a list of strings")
    for target in value:
        if _is_pattern(target):
            _check_pattern(what, target[3:])
    return tuple(value)


def _check_pattern(what: str, pattern: str) -> None:
    """A pattern comes with the model and must not take minutes: no repeated groups, few repetitions."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"config.json: {what} has the pattern {pattern!r}: {error}") from None
    if len(pattern) > 1000 or re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 6:
        raise ValueError(
            f"config.json: {what} has the pattern {pattern!r}, allowed are 6 repetitions, none of a group, and 1000 characters"
        )


def _scheme(name: str, group: Mapping[str, Any], form: Any) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None):
        raise ValueError(f"config.json: group {name!r} has weights {weights!r} and input_activations {inputs!r}")
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
    group_size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    if weights.get("actorder") in ("group", "dynamic", True):
        raise ValueError(
            f"config.json: group {name!r} has actorder {weights['actorder']!r}, where columns and groups are out of order "
            "(weight_g_idx); supported are 'weight' and 'static'"
        )
    if group.get("output_activations") is None and not weights.get("dynamic"):
        if form == "int-quantized" and (kind, bits, strategy, symmetric) == ("int", 8, "channel", True):
            of_tokens = inputs is not None and isinstance(inputs.get("symmetric", True), bool)
            if inputs is not None and of_tokens and _is_8bit_per_token({**inputs, "symmetric": True}, "int"):
                return Int8Scheme(inputs.get("symmetric", True))
        elif form == "float-quantized" and (kind, bits, symmetric) == ("float", 8, True):
            # Of activations with one scale for all we take one a token, which is nearer.
            rounds = inputs is not None and (_is_8bit_per_token(inputs, "float") or _is_fp8_per_tensor(inputs))
            if strategy == "block" and weights.get("block_structure") == [128, 128]:
                if inputs is not None and _is_fp8_per_128(inputs):
                    return Fp8BlockScheme("weight_scale")
            elif strategy in ("channel", "tensor") and rounds:
                return Fp8Scheme(one_scale=strategy == "tensor")
        elif form == "pack-quantized" and (kind, bits) == ("int", 4) and inputs is None and isinstance(symmetric, bool):
            if strategy == "group" and isinstance(group_size, int) and 1 <= group_size < 2**31:
                return Int4Scheme(group_size, symmetric)
            if strategy == "channel":
                return Int4Scheme(None, symmetric)
        elif (form, kind, bits, group_size, symmetric) == ("nvfp4-pack-quantized", "float", 4, 16, True):
            return Fp4Scheme(16, inputs is not None and _is_8bit_per_token(inputs, "float"))
        elif (form, kind, bits, group_size, symmetric) == ("mxfp4-pack-quantized", "float", 4, 32, True):
            return Fp4Scheme(32, inputs is not None and _is_8bit_per_token(inputs, "float"))
    described = ", ".join(
        f"{key} {weights[key]!r}"
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric")
        if key in weights
    )
    activations = (
        "16-bit" if inputs is None else f"{inputs.get('num_bits')}-bit {inputs.get('type')} {inputs.get('strategy')}"
    )
    raise ValueError(
        f"config.json: group {name!r} is {form!r} with weights of {described} and {activations} activations; supported are {_SUPPORTED}"
    )


def _is_8bit_per_token(inputs: Mapping[str, Any], kind: str) -> bool:
    values = (inputs.get("num_bits", 8), inputs.get("type", "int"), inputs.get("strategy"), inputs.get("dynamic"))
    return values == (8, kind, "token", True) and inputs.get("symmetric", True) is True


def _is_fp8_per_128(inputs: Mapping[str, Any]) -> bool:
    values = (inputs.get("num_bits", 8), inputs.get("type", "int"), inputs.get("strategy"), inputs.get("group_size"))
    return (
        values == (8, "float", "group", 128) and inputs.get("dynamic") is True and inputs.get("symmetric", True) is True
    )


def _is_fp8_per_tensor(inputs: Mapping[str, Any]) -> bool:
    values = (inputs.get("num_bits", 8), inputs.get("type", "int"), inputs.get("strategy"))
    return values == (8, "float", "tensor") and inputs.get("symmetric", True) is True
