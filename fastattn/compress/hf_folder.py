"""A model as Hugging Face's tools expect it: what stands in a folder beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Pipeline
from tokenizers.processors import TemplateProcessing

from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.loader import ModelSource
from fastattn.models.loader.safetensors_source import SafetensorsSource
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn.rotary import inverse_frequencies

# our architecture → (model_type, class)
_HF_NAMES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
# Taken over as they are where the source is such a folder itself.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_COPIED_MAX_BYTES = 256 << 20


def stores_norms_minus_one(config: ModelConfig) -> bool:
    """Whether this architecture's checkpoints hold norm weights without the 1 that is added to them (Gemma)."""
    return config.architecture == "gemma3"


def folder_files(
    source: ModelSource, config: ModelConfig, dtype: torch.dtype, quantization: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """File name → text of everything but weights. ``config`` may have fewer layers than the source's. quantization: what
    config.json says of how the weights are stored.

    Raises ValueError for a model that Hugging Face's configuration has no words for.
    """
    files: dict[str, str] = {}
    described = hf_config(config, dtype)
    if isinstance(source, SafetensorsSource):
        folder = Path(source.name)
        for name in _COPIED:
            if (folder / name).is_file() and (folder / name).stat().st_size <= _COPIED_MAX_BYTES:
                files[name] = (folder / name).read_text(encoding="utf-8")
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (
            raw.get("model_type") == described["model_type"]
        ):  # keep what we do not know; a picture model's text part is anew
            raw.pop("quantization_config", None)
            described = raw | described
    if quantization is not None:
        described["quantization_config"] = dict(quantization)
    tokenizer = source.tokenizer()
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = _json(tokenizer_config(tokenizer, config))
    if "generation_config.json" not in files:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": _one_or_list(tokenizer.eos_token_ids)}
        files["generation_config.json"] = _json({key: value for key, value in ends.items() if value is not None})
    return {"config.json": _json(described), **files}


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json that `config_from_hf` reads as ``config``."""
    c = config
    model_type, class_name = _HF_NAMES[c.architecture]
    gemma = c.architecture == "gemma3"
    raw: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),  # the key that transformers 4 and vLLM know
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_bias": c.attention_bias and c.architecture != "qwen2",  # Qwen2 has them without saying so
        "mlp_bias": c.mlp_bias,
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else "silu",
        "bos_token_id": c.bos_token_id,
        "eos_token_id": _one_or_list(c.eos_token_ids),
        "rope_theta": c.rope.theta,
        "rope_scaling": _rope_scaling(c.rope, c.head_dim),
        "sliding_window": c.sliding_window,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in c.layer_is_sliding],
    }
    if c.architecture in ("qwen2", "qwen3"):
        raw |= {"use_sliding_window": c.sliding_window is not None, "max_window_layers": c.num_layers}
    if gemma:
        raw |= {
            "query_pre_attn_scalar": _integer_if_whole(c.softmax_scale**-2),
            "rope_local_base_freq": c.rope_local.theta if c.rope_local is not None else c.rope.theta,
            "attn_logit_softcapping": c.attn_softcap or None,
            "final_logit_softcapping": c.final_softcap or None,
        }
    elif abs(c.softmax_scale * c.head_dim**0.5 - 1) > 1e-6 or c.attn_softcap or c.final_softcap:
        raise ValueError(f"architecture {c.architecture!r}: config.json cannot say its softmax scale or soft caps")
    return raw


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _integer_if_whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _rope_scaling(rope: RopeConfig, head_dim: int) -> dict[str, Any] | None:
    if rope.freq_factors is not None:
        return _llama3_scaling(rope, head_dim)
    if rope.scaling_type == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling_type, "factor": rope.factor}
    if rope.scaling_type == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    if rope.scaling_type == "yarn":
        scaling |= {
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }
    return scaling


def _llama3_scaling(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """GGUF files carry Llama 3's scaling as a divisor per frequency; config.json wants the parameters it came from. All of
    Llama 3 use the same but for the factor, which is the largest divisor."""
    assert rope.freq_factors is not None
    guess = RopeConfig(theta=rope.theta, scaling_type="llama3", factor=max(rope.freq_factors))
    if not torch.allclose(inverse_frequencies(guess, head_dim), inverse_frequencies(rope, head_dim), rtol=1e-4):
        raise ValueError("the model's rotary frequency divisors are not Llama 3's, config.json has no words for them")
    scaling = _rope_scaling(guess, head_dim)
    assert scaling is not None
    return scaling


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json. What our encoder adds around a text is a step of the pipeline there."""
    parts, names = tokenizer.parts(), _names(tokenizer)
    pipeline = Pipeline.from_str(parts["pipeline"])
    first = [tokenizer.bos_token_id] if parts["add_bos"] else []
    last = list(tokenizer.eos_token_ids[:1]) if parts["add_eos"] else []
    if first or last:
        before, after = [names[i] for i in first], [names[i] for i in last]
        pipeline.post_processor = TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            pair=" ".join([*before, "$A", *after, *before, "$B", *after]),
            special_tokens=[(names[i], i) for i in (*first, *last)],
        )
    text: str = pipeline.to_str(pretty=True)
    return text


def tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    parts, names = tokenizer.parts(), _names(tokenizer)
    raw: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": parts["add_bos"],
        "add_eos_token": parts["add_eos"],
        "bos_token": names.get(tokenizer.bos_token_id),
        "eos_token": names.get(tokenizer.eos_token_ids[0]) if tokenizer.eos_token_ids else None,
        "chat_template": parts["chat_template"],
    }
    return {key: value for key, value in raw.items() if value is not None}


def _names(tokenizer: Tokenizer) -> dict[int | None, str]:
    return {token_id: token for token, token_id in tokenizer.vocabulary().items()}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
