"""A model written as a Hugging Face folder is the model that it was, to us and to transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn.compress import QuantizeOptions, inspect_model, quantize, read_receipt
from fastattn.compress.hf_folder import hf_config, tokenizer_json
from fastattn.compress.receipt import source_digest
from fastattn.models.config import ModelConfig, RopeConfig, config_from_hf
from fastattn.models.loader import ModelFileError, ModelSource, open_model
from fastattn.models.registry import load_model
from fastattn.nn.rotary import inverse_frequencies
from tests.engine.tiny import CONFIG, TinySource, full_logits

LLAMA3 = RopeConfig(theta=5e5, scaling_type="llama3", factor=8.0)
GEMMA = replace(
    CONFIG,
    architecture="gemma3",
    rope=RopeConfig(theta=1e6),
    rope_local=RopeConfig(theta=1e4),
    tie_word_embeddings=True,
    qk_norm=True,
    activation="gelu_tanh",
    sliding_window=16,
    layer_is_sliding=(True, False),
    softmax_scale=16**-0.5,
    embed_scale=32**0.5,
    norm_plus_one=True,
)
CONFIGS = {
    "llama": CONFIG,
    "llama tied, scaled": replace(CONFIG, tie_word_embeddings=True, rope=RopeConfig(scaling_type="linear", factor=2.0)),
    "llama 3": replace(CONFIG, rope=LLAMA3, eos_token_ids=(1, 5)),
    "mistral": replace(CONFIG, architecture="mistral", sliding_window=32, layer_is_sliding=()),
    "qwen2": replace(CONFIG, architecture="qwen2", attention_bias=True),
    "qwen3": replace(CONFIG, architecture="qwen3", qk_norm=True, head_dim=16, softmax_scale=0.0),
    "gemma3": GEMMA,
}
TOKENS = [0, 17, 40, 23, 61, 8, 99, 5, 31, 31, 64, 7] * 4


def logits(source: ModelSource) -> torch.Tensor:
    return full_logits(load_model(source, torch.device("cpu"), torch.float32, 64), TOKENS)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_config_says_the_same(config: ModelConfig) -> None:
    assert config_from_hf(json.loads(json.dumps(hf_config(config, torch.float32)))) == config


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_logits_are_the_same(config: ModelConfig, tmp_path: Path) -> None:
    source = TinySource(config=config)
    out = quantize(source, tmp_path / "out", QuantizeOptions(scheme="none", dtype="float32"))
    # Gemma's norms lose their 1 on the way to the file and get it back: one rounding each way.
    torch.testing.assert_close(
        logits(open_model(out)),
        logits(source),
        rtol=1e-4 if config is GEMMA else 0,
        atol=1e-4 if config is GEMMA else 0,
    )
    again = quantize(str(out), tmp_path / "again", QuantizeOptions(scheme="none"))  # a folder of a folder
    assert torch.equal(logits(open_model(again)), logits(open_model(out)))
    assert read_receipt(again)["dtype"] == "float32"  # type: ignore[index]


@pytest.mark.parametrize("name", ["llama", "llama 3", "qwen2", "qwen3", "gemma3", "mistral"])
def test_transformers_reads_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = TinySource(config=CONFIGS[name])
    out = quantize(source, tmp_path / "out", QuantizeOptions(scheme="none", dtype="float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found, logits(source), rtol=1e-3, atol=2e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    if name != "qwen2":  # for this model type transformers cuts text in Qwen's way, whatever tokenizer.json says
        assert tokenizer("the cat 00")["input_ids"] == source.tokenizer().encode("the cat 00")
    messages = [{"role": "user", "content": "hi"}]
    expected = source.tokenizer().apply_chat_template(messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def test_the_tokenizer_is_the_same(tmp_path: Path) -> None:
    source = TinySource()
    out = quantize(source, tmp_path / "out", QuantizeOptions(scheme="none"))
    ours, theirs = source.tokenizer(), open_model(out).tokenizer()
    for text in ("", "the cat", "</s> a € é", "00 00"):
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.eos_token_ids == ours.eos_token_ids and theirs.bos_token_id == ours.bos_token_id
    assert "post_processor" in json.loads(tokenizer_json(ours))


def test_llama3_scaling_out_of_a_gguf_file() -> None:
    plain = inverse_frequencies(RopeConfig(theta=5e5), 64)
    factors = tuple(float(f) for f in plain / inverse_frequencies(LLAMA3, 64))
    config = replace(CONFIG, head_dim=64, softmax_scale=0.0, rope=RopeConfig(theta=5e5, freq_factors=factors))
    scaling = hf_config(config, torch.float32)["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == pytest.approx(8)
    odd = replace(config, rope=replace(config.rope, freq_factors=(1.0, 3.0) * 16))
    with pytest.raises(ValueError, match="has no words for them"):
        hf_config(odd, torch.float32)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(scaling_type="yarn", factor=4.0, original_max_position=32, beta_fast=16.0, attention_factor=1.2),
        RopeConfig(scaling_type="dynamic", factor=4.0),
    ],
)
def test_rotary_scaling_is_written_as_it_was_read(rope: RopeConfig) -> None:
    raw = hf_config(replace(CONFIG, max_position_embeddings=128, rope=rope), torch.float32)
    assert config_from_hf(raw).rope == rope


def test_unknown_fields_of_a_folder_stay(tmp_path: Path) -> None:
    out = quantize(TinySource(), tmp_path / "out", QuantizeOptions(scheme="none"))
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"initializer_range": 0.5, "dtype": "float16"}))
    again = quantize(str(out), tmp_path / "again", QuantizeOptions(scheme="none"))
    found = json.loads((again / "config.json").read_text())
    assert found["initializer_range"] == 0.5 and found["dtype"] == "float32"


def test_receipt(tmp_path: Path, text: str) -> None:
    from fastattn.compress import CalibrationOptions

    source = TinySource(config=replace(CONFIG, intermediate_size=64))
    options = QuantizeOptions(scheme="int4", calibration=CalibrationOptions((text,), 4, 32))
    out = quantize(source, tmp_path / "out", options)
    receipt: dict[str, Any] = read_receipt(out) or {}
    assert receipt["command"] == "quantize" and receipt["source"]["digest"] == source_digest(source)
    assert receipt["method"] == {
        "scheme": "int4", "group_size": 32, "rounding": "gptq", "steps": "mse", "damp": 0.01, "reorder": True,
    }  # fmt: skip
    assert receipt["calibration"]["text"] == "text.txt" and receipt["calibration"]["windows"] == [4, 32]
    assert [record["layer"] for record in receipt["records"]] == [0, 1]
    errors = receipt["records"][1]["output_error"]
    assert set(errors) == {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
    assert all(0 < error < 0.1 for error in errors.values())
    assert receipt["versions"]["torch"] == torch.__version__
    stored = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0 < stored - receipt["bytes"]["after"] < 0.4 * stored  # headers
    assert receipt["bytes"]["before"] == sum(info.nbytes for info in source.tensors().values())
    other = TinySource(seed=1, config=source.config)
    assert source_digest(other) != source_digest(source)


def test_numbers_that_would_spoil_the_model(tmp_path: Path) -> None:
    class Spoilt(TinySource):
        value = float("nan")

        def read(self, name: str, out: torch.Tensor, shard: Any = None, copier: object = None) -> None:
            super().read(name, out, shard)
            if name == "model.layers.1.mlp.up_proj.weight":
                out[0, 0] = self.value

    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"):
        quantize(Spoilt(), tmp_path / "out", QuantizeOptions(scheme="int8", rounding="nearest", smooth=0))
    Spoilt.value = 1e5
    with pytest.raises(ValueError, match=r"up_proj\.weight holds numbers too large for dtype 'float16'"):
        quantize(Spoilt(), tmp_path / "out", QuantizeOptions(scheme="none", dtype="float16"))
    quantize(Spoilt(), tmp_path / "out", QuantizeOptions(scheme="none", dtype="bfloat16"))


def test_inspect_takes_any_name_of_a_tensor(tmp_path: Path) -> None:
    out = quantize(TinySource(), tmp_path / "out", QuantizeOptions(scheme="none"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file({**tensors, "extra": torch.zeros(3)}, out / "all.safetensors")
    index["weight_map"] = dict.fromkeys([*tensors, "extra"], "all.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {group.name: group.num_parameters for group in inspect_model(str(out)).groups}["other"] == 3


def test_inspect_says_what_is_there(tmp_path: Path) -> None:
    source = TinySource()
    found = inspect_model(source)
    total = sum(torch.Size(info.shape).numel() for info in source.tensors().values())
    assert found.num_parameters == total and found.num_bytes == 4 * total and found.bits == 32
    assert {group.name for group in found.groups} == {"embeddings", "attention", "feed-forward", "norms", "head"}
    assert found.receipt is None and found.quantization is None
    out = quantize(source, tmp_path / "out", QuantizeOptions(scheme="none", dtype="bfloat16"))
    again = inspect_model(str(out))
    assert again.num_parameters == total and again.bits == 16 and again.receipt is not None
    (out / "receipt.json").write_text("[1")
    with pytest.raises(ValueError, match="receipt"):
        inspect_model(str(out))


@pytest.mark.slow
def test_smollm2_from_gguf_to_a_folder(tmp_path: Path) -> None:
    try:
        source = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had here: {error}")
    out = open_model(quantize(source, tmp_path / "out", QuantizeOptions(scheme="none", dtype="float32")))
    assert torch.equal(logits(out), logits(source))
    text = "def f(x):\n    return 3.14  # naïve 12345 \U0001f600"
    assert out.tokenizer().encode(text) == source.tokenizer().encode(text)
