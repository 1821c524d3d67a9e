"""What a model is: sizes and switches, read from Hugging Face's config.json or from GGUF metadata, and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.models.quantization import QuantizationConfig, kv_cache_scheme_from_hf, quantization_from_hf

# "dynamic" changes nothing up to max_position_embeddings, and more tokens than that are not taken.
SCALING_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")

_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 256,
    "max_position_embeddings": 2**27,
    "sliding_window": 2**31 - 1,
}


def _check_size(name: str, value: Any) -> None:
    """Sizes are checked before anything is computed from them: a tuple per layer of 2³¹ layers would be 16 GiB."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[name]:
        raise ValueError(f"ModelConfig: {name} is {value!r}, allowed is an integer from 1 to {_LIMITS[name]}")


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number out of a config.json; null is like absent."""
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
        raise ValueError(f"config.json: {key} is {value!r}, expected a number")
    return float(value)


@dataclass(frozen=True)
class RopeConfig:
    """theta: base of the angular frequencies. scaling_type, factor and the rest: how a model stretches them for long context
    (see `nn.rotary`). beta_fast, beta_slow, truncate: YaRN's. freq_factors: a divisor per frequency, as GGUF files carry it for Llama 3. attention_factor: scales
    cosines and sines."""

    theta: float = 10_000.0
    scaling_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    freq_factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.scaling_type not in SCALING_TYPES:
            raise ValueError(
                f"RopeConfig: scaling_type is {self.scaling_type!r}, supported are {', '.join(SCALING_TYPES)}"
            )
        numbers = (
            "theta",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        )
        for name in numbers:
            if not 0 < getattr(self, name) < 1e12:
                raise ValueError(f"RopeConfig: {name} is {getattr(self, name)!r}, allowed is above 0, below 1e12")
        if not isinstance(self.original_max_position, int) or self.original_max_position < 1:
            raise ValueError(f"RopeConfig: original_max_position is {self.original_max_position!r}, allowed is above 0")
        if bad := [f for f in self.freq_factors or () if not 0 < f < 1e12]:
            raise ValueError(f"RopeConfig: freq_factors has {bad[0]!r}, allowed is above 0, below 1e12")
        if self.freq_factors is not None and self.scaling_type != "default":
            raise ValueError(
                f"RopeConfig: scaling_type is {self.scaling_type!r}, allowed with freq_factors is 'default'"
            )
        if self.scaling_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"RopeConfig: low_freq_factor is {self.low_freq_factor}, allowed is below high_freq_factor = {self.high_freq_factor}"
            )
        if self.scaling_type == "yarn" and not self.beta_slow < self.beta_fast:
            raise ValueError(
                f"RopeConfig: beta_slow is {self.beta_slow}, allowed is below beta_fast = {self.beta_fast}"
            )
        if self.scaling_type == "yarn" and self.theta <= 1:
            raise ValueError(f"RopeConfig: theta is {self.theta}, allowed with yarn is above 1")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"RopeConfig: truncate is {self.truncate!r}, expected a bool")

    @property
    def longest(self) -> int:
        """Positions that YaRN stretches the model's to; without it 0."""
        return int(self.factor * self.original_max_position) if self.scaling_type == "yarn" else 0

    @classmethod
    def from_hf(cls, scaling: Mapping[str, Any] | None, theta: float, max_position: int) -> RopeConfig:
        """From `rope_scaling` (or `rope_parameters`) of a config.json whose `max_position_embeddings` is max_position."""
        if not isinstance(scaling, Mapping | None):
            raise ValueError(f"config.json: rope_scaling is {scaling!r}, expected an object")
        scaling = scaling or {}
        kind = str(scaling.get("rope_type", scaling.get("type", "default")))
        _check_whole_heads(scaling)
        trained = max_position if kind in ("llama3", "yarn") else cls.original_max_position
        original = int(_number(scaling, "original_max_position_embeddings", trained))
        factor = _number(scaling, "factor", max_position / original if kind == "yarn" and original > 0 else 1.0)
        return cls(
            theta=_number(scaling, "rope_theta", theta),
            scaling_type=kind,
            factor=factor,
            low_freq_factor=_number(scaling, "low_freq_factor", 1.0),
            high_freq_factor=_number(scaling, "high_freq_factor", 4.0),
            original_max_position=original,
            beta_fast=_number(scaling, "beta_fast", 32.0),
            beta_slow=_number(scaling, "beta_slow", 1.0),
            truncate=scaling.get("truncate", True),
            attention_factor=_yarn_attention_factor(scaling, factor) if kind == "yarn" else 1.0,
        )


def _check_whole_heads(raw: Mapping[str, Any]) -> None:
    if (part := raw.get("partial_rotary_factor")) not in (None, 1):
        raise ValueError(f"config.json: partial_rotary_factor is {part!r}, supported is 1")


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """What the model says, or what the paper suggests; DeepSeek's form of it has two scales."""

    def suggested(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scale, scale_of_all = _number(scaling, "mscale", 0.0), _number(scaling, "mscale_all_dim", 0.0)
    default = suggested(scale) / suggested(scale_of_all) if scale > 0 and scale_of_all > 0 else suggested(1.0)
    return _number(scaling, "attention_factor", default)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only model. Sizes are counts; norm_plus_one: stored norm weights lack the 1 that Gemma adds to them.
    quantization: which linear layers have weights of few bits. kv_cache_scheme: the KV cache, "fp8" or "int8", that a
    quantized checkpoint has static scales for."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    rope_local: RopeConfig | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    softmax_scale: float = 0.0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    sliding_window: int | None = None
    layer_is_sliding: tuple[bool, ...] = ()
    embed_scale: float = 1.0
    norm_plus_one: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationConfig | None = None
    kv_cache_scheme: str | None = None

    def __post_init__(self) -> None:
        for name in _LIMITS:
            if name != "sliding_window":
                _check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"ModelConfig: num_heads is {self.num_heads}, expected a multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 8:
            raise ValueError(f"ModelConfig: head_dim is {self.head_dim}, expected a multiple of 8")
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(f"ModelConfig: rms_norm_eps is {self.rms_norm_eps!r}, allowed is above 0, below 1")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"ModelConfig: activation is {self.activation!r}, supported are 'silu' and 'gelu_tanh'")
        if self.softmax_scale == 0.0:
            object.__setattr__(self, "softmax_scale", self.head_dim**-0.5)
        if not self.layer_is_sliding:
            object.__setattr__(self, "layer_is_sliding", (self.sliding_window is not None,) * self.num_layers)
        if len(self.layer_is_sliding) != self.num_layers:
            raise ValueError(
                f"ModelConfig: layer_is_sliding has {len(self.layer_is_sliding)} entries, expected num_layers = {self.num_layers}"
            )
        if any(self.layer_is_sliding):
            _check_size("sliding_window", self.sliding_window)
        for name, least in (
            ("softmax_scale", 1e-12),
            ("embed_scale", 1e-12),
            ("attn_softcap", 0),
            ("final_softcap", 0),
        ):
            if not least <= getattr(self, name) < 1e12:
                raise ValueError(
                    f"ModelConfig: {name} is {getattr(self, name)!r}, allowed is from {least:g}, below 1e12"
                )
        for token in (*self.eos_token_ids, *([] if self.bos_token_id is None else [self.bos_token_id])):
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(f"ModelConfig: a BOS or EOS id is {token!r}, expected an integer from 0")
        if self.rope.freq_factors is not None and len(self.rope.freq_factors) != self.head_dim // 2:
            raise ValueError(
                f"ModelConfig: rope.freq_factors has {len(self.rope.freq_factors)} entries, expected head_dim / 2 = {self.head_dim // 2}"
            )


# model_type in config.json → our architecture
_HF_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
_HF_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """From the contents of a config.json. Raises ValueError for a model that we do not run."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in _HF_TYPES:
        raise ValueError(f"config.json: model_type is {kind!r}, supported are {', '.join(sorted(_HF_TYPES))}")
    if kind == "gemma3" and isinstance(raw.get("text_config"), Mapping):
        if raw.get("quantization_config") is not None:
            raise ValueError("config.json: quantization_config of a model with vision is not supported")
        raw = {**raw["text_config"], "eos_token_id": raw.get("eos_token_id", raw["text_config"].get("eos_token_id"))}
    try:
        return _config_from_hf(_HF_TYPES[kind], raw)
    except KeyError as error:
        raise ValueError(f"config.json: {error.args[0]!r} is missing") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config.json: a field has the wrong type ({error})") from None


def _config_from_hf(arch: str, raw: Mapping[str, Any]) -> ModelConfig:
    num_layers, num_heads, hidden_size = raw["num_hidden_layers"], raw["num_attention_heads"], raw["hidden_size"]
    for name, size in (("num_layers", num_layers), ("num_heads", num_heads), ("hidden_size", hidden_size)):
        _check_size(name, size)
    head_dim = raw.get("head_dim") or hidden_size // num_heads
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    if not isinstance(activation, str) or activation not in _HF_ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act is {activation!r}, supported are {', '.join(sorted(_HF_ACTIVATIONS))}"
        )
    max_position = raw.get("max_position_embeddings", 2048)
    _check_size("max_position_embeddings", max_position)
    _check_whole_heads(raw)
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling")
    gemma = arch == "gemma3"
    rope_local = None
    if gemma:
        by_kind = scaling if isinstance(scaling, Mapping) else {}
        full, sliding = by_kind.get("full_attention", scaling), by_kind.get("sliding_attention")
        rope = RopeConfig.from_hf(full, _number(raw, "rope_theta", 1e6), max_position)
        rope_local = RopeConfig.from_hf(sliding, _number(raw, "rope_local_base_freq", 10_000.0), max_position)
    else:
        rope = RopeConfig.from_hf(scaling, _number(raw, "rope_theta", 10_000.0), max_position)
    window = raw.get("sliding_window")
    if arch == "qwen2" or arch == "qwen3":
        window = window if raw.get("use_sliding_window") else None
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
            raise ValueError(f"config.json: layer_types is {layer_types!r}, expected a list of strings")
        sliding_layers = tuple(kind == "sliding_attention" for kind in layer_types)
    elif gemma:
        pattern = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
        if not isinstance(pattern, int) or pattern < 1:
            raise ValueError(f"config.json: sliding_window_pattern is {pattern!r}, expected an integer from 1")
        sliding_layers = tuple((i + 1) % pattern != 0 for i in range(num_layers))
    else:
        sliding_layers = (window is not None,) * num_layers
    eos = raw.get("eos_token_id")
    query_scalar = _number(raw, "query_pre_attn_scalar", 0.0) if gemma else 0.0
    if query_scalar < 0:
        raise ValueError(f"config.json: query_pre_attn_scalar is {query_scalar!r}, expected a number above 0")
    return ModelConfig(
        architecture=arch,
        vocab_size=raw["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=raw["intermediate_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        max_position_embeddings=max(max_position, rope.longest),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=rope,
        rope_local=rope_local,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        attention_bias=arch == "qwen2" or bool(raw.get("attention_bias", False)),
        attention_out_bias=arch != "qwen2" and bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=arch in ("qwen3", "gemma3"),
        activation=_HF_ACTIVATIONS[activation],
        softmax_scale=query_scalar**-0.5 if query_scalar else 0.0,
        attn_softcap=_number(raw, "attn_logit_softcapping", 0.0),
        final_softcap=_number(raw, "final_logit_softcapping", 0.0),
        sliding_window=window,
        layer_is_sliding=sliding_layers,
        embed_scale=float(hidden_size) ** 0.5 if gemma else 1.0,
        norm_plus_one=gemma,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        quantization=quantization_from_hf(raw),
        kv_cache_scheme=kv_cache_scheme_from_hf(raw),
    )


_GGUF_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}


def config_from_gguf(
    metadata: Mapping[str, Any], vocab_size: int, has_lm_head: bool, freq_factors: tuple[float, ...] | None = None
) -> ModelConfig:
    """From a GGUF file's key-value pairs (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _GGUF_ARCHITECTURES:
        raise ValueError(f"general.architecture is {name!r}, supported are {', '.join(sorted(_GGUF_ARCHITECTURES))}")
    arch = _GGUF_ARCHITECTURES[name]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{name}.{key}", default)
        if value is None:
            raise ValueError(f"metadata {name}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"metadata {name}.{key} is {value!r}, expected a number")
        return value

    num_layers, hidden_size, num_heads = get("block_count"), get("embedding_length"), get("attention.head_count")
    for size_name, size in (("num_layers", num_layers), ("num_heads", num_heads), ("hidden_size", hidden_size)):
        _check_size(size_name, size)
    head_dim = get("attention.key_length", hidden_size // num_heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(
            f"metadata {name}.rope.dimension_count is {get('rope.dimension_count')}, supported is head_dim = {head_dim}"
        )
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"metadata {name}.rope.scaling.type is {scaling!r}, supported are 'none', 'linear' and 'yarn'")
    if get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):  # llama.cpp's -1: as its default is
        raise ValueError(
            f"metadata {name}.rope.scaling.yarn_ext_factor is {get('rope.scaling.yarn_ext_factor')}, supported is 1"
        )
    max_position, factor = get("context_length"), float(get("rope.scaling.factor", 1.0))
    of_attention = get("rope.scaling.yarn_attn_factor", get("rope.scaling.attn_factor", 1.0))
    rope = RopeConfig(
        theta=float(get("rope.freq_base", 1e6 if arch == "gemma3" else 10_000.0)),
        scaling_type="default" if scaling == "none" or factor == 1 else scaling,
        factor=factor,
        original_max_position=get(
            "rope.scaling.original_context_length",
            max_position if scaling == "yarn" else RopeConfig.original_max_position,
        ),
        beta_fast=float(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(get("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=_yarn_attention_factor({}, factor) * of_attention if scaling == "yarn" else 1.0,
        freq_factors=freq_factors,
    )
    gemma = arch == "gemma3"
    window = get("attention.sliding_window", 0) or None if gemma else None
    eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    return ModelConfig(
        architecture=arch,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=get("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=max(max_position, rope.longest),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        rope=rope,
        rope_local=RopeConfig(theta=float(get("rope.freq_base_swa", 10_000.0))) if gemma else None,
        tie_word_embeddings=not has_lm_head,
        attention_bias=arch == "qwen2",
        qk_norm=arch in ("qwen3", "gemma3"),
        activation="gelu_tanh" if gemma else "silu",
        final_softcap=float(get("final_logit_softcapping", 0.0)),
        sliding_window=window,
        # Five local layers, then a global one; the file says only the window.
        layer_is_sliding=tuple((i + 1) % 6 != 0 for i in range(num_layers)) if window else (False,) * num_layers,
        embed_scale=float(hidden_size) ** 0.5 if gemma else 1.0,
        norm_plus_one=False,  # the converter has added it already
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(int(e) for e in eos if isinstance(e, int))),
    )
