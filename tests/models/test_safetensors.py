"""Folders in Hugging Face's layout: the same next tokens as transformers, and damage that is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastattn import LLM, SamplingParams
from fastattn.models.loader import open_model
from fastattn.models.loader.errors import ModelFileError

VOCAB = 64
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, rope_scaling=LLAMA3)),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL, rope_scaling=YARN)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL, sliding_window=8, query_pre_attn_scalar=16)),
}


def save(name: str, folder: Path, **options: Any) -> Any:
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config).eval().float()
    for parameter in model.parameters():  # spread, so that two tokens are never nearly equal
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder, **options)
    vocab = {f"w{i}": i for i in range(VOCAB)}
    Tokenizer(WordLevel(vocab, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path, **({"max_shard_size": "60KB"} if name == "llama" else {}))
    llm = LLM(str(tmp_path), device="cpu", dtype="float32", max_model_len=128, quiet=True)
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(n)] for n in (1, 7, 23)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(20):
                best = model(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], 1)
        assert output.outputs[0].token_ids == ids[0, len(prompt) :].tolist()


def _read_all(folder: Path) -> None:
    source = open_model(folder)
    source.tokenizer()
    for name, info in source.tensors().items():
        source.read(name, torch.empty(info.shape))


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    """500 cuts and 2,000 flipped bits of the weights and of the JSON files: an error of ours or an answer."""
    save("qwen3", tmp_path)
    _read_all(tmp_path)
    rng = random.Random(1)
    refused = 0
    for file, cuts, flips in (("model.safetensors", 400, 1700), ("config.json", 100, 300)):
        path = tmp_path / file
        whole = path.read_bytes()
        header = min(len(whole), 4096)
        for case in range(cuts + flips):
            data = bytearray(whole)
            if case < cuts:
                data = data[: rng.randrange(len(whole))]
            else:  # most of them where the structure is
                bit = rng.randrange(8 * (header if case % 8 else len(whole)))
                data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                _read_all(tmp_path)
            except ModelFileError:
                refused += 1
        path.write_bytes(whole)
    assert refused > 1000


def test_shards_outside_the_folder_are_refused(tmp_path: Path) -> None:
    save("qwen2", tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    for file in ("../x.safetensors", "/etc/x.safetensors", 3, "x.bin"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: file}}))
        with pytest.raises(ModelFileError, match=r"index\.json.*expected a \.safetensors file name"):
            open_model(tmp_path)
