"""Model configurations: the same numbers as transformers reads, out of both file formats, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fastattn.models.config import ModelConfig, RopeConfig, config_from_gguf, config_from_hf
from fastattn.nn.rotary import inverse_frequencies

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, **SIZES}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 8,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.eos_token_id": 2,
}


def of_transformers(kind: str, **changes: Any) -> ModelConfig:
    return config_from_hf(transformers.AutoConfig.for_model(kind, **{**SIZES, **changes}).to_dict())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_what_transformers_writes_is_read(kind: str) -> None:
    config = of_transformers(kind)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (8, 4, 2)
    theirs = transformers.AutoConfig.for_model(kind, **SIZES)
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.qk_norm == (kind in ("qwen3", "gemma3_text"))
    assert (config.attention_bias, config.attention_out_bias) == (kind == "qwen2", False)
    assert config.norm_plus_one == (kind == "gemma3_text")
    if kind == "gemma3_text":
        assert config.layer_is_sliding == tuple(name == "sliding_attention" for name in theirs.layer_types)
        assert config.embed_scale == 8.0 and config.activation == "gelu_tanh"
        assert config.softmax_scale == theirs.query_pre_attn_scalar**-0.5
        assert config.rope_local is not None and config.rope_local.theta == 10_000.0 and config.rope.theta == 1e6
    if kind == "mistral":
        assert config.sliding_window == theirs.sliding_window and all(config.layer_is_sliding)


def test_both_formats_say_the_same() -> None:
    hf = config_from_hf(LLAMA | {"eos_token_id": 2, "tie_word_embeddings": True})
    assert config_from_gguf(GGUF, 128, has_lm_head=False) == hf


def test_a_window_that_is_switched_off() -> None:
    assert config_from_hf(LLAMA | {"model_type": "qwen2", "sliding_window": 64}).sliding_window is None
    config = config_from_hf(LLAMA | {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True})
    assert config.sliding_window == 64 and all(config.layer_is_sliding)


def test_gemma_as_a_part_of_a_larger_model() -> None:
    text = transformers.AutoConfig.for_model("gemma3_text", **SIZES).to_dict()
    config = config_from_hf({"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]})
    assert config.eos_token_ids == (1, 106) and config.architecture == "gemma3"


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5},
    ],
)
def test_rope_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    theirs = transformers.AutoConfig.for_model(
        "llama", **SIZES, head_dim=64, rope_parameters={"rope_theta": 50_000.0, **scaling}
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    rope = config_from_hf(theirs.to_dict()).rope
    torch.testing.assert_close(inverse_frequencies(rope, 64), rotary.inv_freq, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)


def test_divisors_of_a_gguf_file_and_another_scaling_exclude_one_another() -> None:
    metadata = GGUF | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(ValueError, match="scaling_type is 'yarn', allowed with freq_factors is 'default'"):
        config_from_gguf(metadata, 128, has_lm_head=False, freq_factors=(2.0,) * 8)
    metadata["llama.rope.scaling.factor"] = 1.0  # which is none
    assert config_from_gguf(metadata, 128, has_lm_head=False, freq_factors=(2.0,) * 8).rope.scaling_type == "default"


def test_yarn_stretches_the_longest_context() -> None:
    """Qwen's way to write it: max_position_embeddings is what the model was trained with."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = config_from_hf(LLAMA | {"max_position_embeddings": 512, "rope_scaling": scaling})
    assert config.max_position_embeddings == 2048
    # DeepSeek's: it is what the model can do, and the factor may be left to that.
    del scaling["factor"]
    again = config_from_hf(LLAMA | {"max_position_embeddings": 2048, "rope_scaling": scaling})
    assert again == config


def test_yarn_in_gguf_metadata_is_that_of_a_config_json() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    changes = {"type": "yarn", "factor": 4.0, "original_context_length": 512}
    found = config_from_gguf(
        GGUF | {f"llama.rope.scaling.{key}": value for key, value in changes.items()}, 128, has_lm_head=False
    )
    assert found.rope == config_from_hf(LLAMA | {"rope_scaling": scaling}).rope
    assert found.max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, r"model_type is 'mamba', supported are gemma3, "),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "hidden_size is None, allowed is an integer from 1"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 2**31}, "num_layers is 2147483648, allowed is an integer from 1 to 4096"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"num_key_value_heads": 3}, "num_heads is 4, expected a multiple of num_kv_heads = 3"),
        ({"head_dim": 12}, "head_dim is 12, expected a multiple of 8"),
        ({"head_dim": 512}, "head_dim is 512, allowed is an integer from 1 to 256"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": 2}, "rms_norm_eps is 2.0, allowed is above 0, below 1"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny', expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', supported are "),
        ({"rope_scaling": 3}, "rope_scaling is 3, expected an object"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "scaling_type is 'longrope', supported are default, dynamic, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": -2.0}}, "factor is -2.0, allowed is above 0"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1}},
            "beta_slow is 1.0, allowed is below beta_fast = 1.0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate is 'no', expected a bool"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, "original_max_position is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e9}}, "max_position_embeddings is "),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, supported is 1"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, supported is 1"),
        ({"rope_theta": -1}, "theta is -1.0, allowed is above 0"),
        ({"layer_types": "all"}, "layer_types is 'all', expected a list of strings"),
        ({"layer_types": ["full_attention"]}, "layer_is_sliding has 1 entries, expected num_layers = 8"),
        ({"layer_types": ["sliding_attention"] * 8}, "sliding_window is None"),
        ({"eos_token_id": -2}, "a BOS or EOS id is -2"),
        ({"eos_token_id": ["</s>"]}, "a BOS or EOS id is '</s>'"),
        ({"attn_logit_softcapping": -1.0}, "attn_softcap is -1.0"),
    ],
)
def test_what_is_wrong_in_a_config_json_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        config_from_hf(LLAMA | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key in SIZES if key not in ("num_key_value_heads", "max_position_embeddings")])
def test_what_is_missing_in_a_config_json_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: '{key}' is missing"):
        config_from_hf({name: value for name, value in LLAMA.items() if name != key})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"general.architecture": "mamba"},
            "general.architecture is 'mamba', supported are gemma3, llama, qwen2, qwen3",
        ),
        ({"llama.block_count": 0}, "num_layers is 0"),
        ({"llama.embedding_length": [1]}, r"embedding_length is \[1\], expected a number"),
        ({"llama.feed_forward_length": 1.5}, "intermediate_size is 1.5"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, supported is head_dim = 16"),
        (
            {"llama.rope.scaling.type": "longrope"},
            "rope.scaling.type is 'longrope', supported are 'none', 'linear' and",
        ),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5, supported is 1"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_what_is_wrong_in_gguf_metadata_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config_from_gguf(GGUF | changes, 128, has_lm_head=False)


@pytest.mark.parametrize("key", [key for key in GGUF if key.startswith("llama.") and not key.endswith("_kv")])
def test_what_is_missing_in_gguf_metadata_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"metadata {key} is missing"):
        config_from_gguf({name: value for name, value in GGUF.items() if name != key}, 128, has_lm_head=False)


def test_frequency_factors_of_another_size() -> None:
    with pytest.raises(ValueError, match="freq_factors has 3 entries, expected head_dim / 2 = 8"):
        config_from_gguf(GGUF, 128, has_lm_head=False, freq_factors=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"freq_factors has 0\.0, allowed is above 0"):
        RopeConfig(freq_factors=(0.0,))
