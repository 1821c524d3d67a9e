"""Writes tiny models as GGUF files, and finds the fields of their headers so that tests can damage them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

QUANT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Where a block's fp16 scales are, for the types that gguf decodes but does not encode.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6

LLAMA_TOKENS = [*sorted(ByteLevel.alphabet()), "he", "ll", "hell", "hello", "<|im_start|>", "<|im_end|>"]
LLAMA_MERGES = ["h e", "l l", "he ll", "hell o"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁helo", "he", "ll", "▁he"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def random_rows(rng: np.random.Generator, quant: str, rows: int, columns: int) -> np.ndarray:
    """Stored bytes (rows, bytes per row) of random numbers, all finite."""
    quant_type = GGMLQuantizationType[quant]
    if quant not in _SCALES:
        numbers = rng.standard_normal((rows, columns), np.float32) * 0.2
        return np.ascontiguousarray(quantize(numbers, quant_type)).view(np.uint8).reshape(rows, -1)
    block_size, block_bytes = GGML_QUANT_SIZES[quant_type]
    blocks = rng.integers(0, 256, (rows, columns // block_size, block_bytes), np.uint8)
    for at in _SCALES[quant]:
        scales = rng.uniform(-0.01, 0.01, blocks.shape[:2]).astype("<f2")
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def tensor_shapes(arch: str, hidden: int, layers: int, vocab: int, heads: int = 4, kv_heads: int = 2) -> dict[str, Any]:
    """GGUF name → shape, rows first."""
    kv = hidden // heads * kv_heads
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (hidden, hidden),
        "ffn_up": (hidden, hidden),
        "ffn_down": (hidden, hidden),
    }
    if arch == "gemma3":
        layer |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
        layer |= {"attn_q_norm": (hidden // heads,), "attn_k_norm": (hidden // heads,)}
    shapes: dict[str, Any] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    for index in range(layers):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def metadata_of(arch: str, hidden: int, layers: int, heads: int = 4, kv_heads: int = 2) -> dict[str, Any]:
    metadata = {
        "general.alignment": 32,
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": hidden,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10_000.0,
    }
    if arch == "gemma3":
        return metadata | {
            "gemma3.attention.key_length": hidden // heads,
            "gemma3.attention.sliding_window": 16,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": GEMMA_TOKENS,
            # Pairs that come earlier in the vocabulary are merged first.
            "tokenizer.ggml.scores": [-float(i) for i in range(len(GEMMA_TOKENS))],
            "tokenizer.ggml.token_type": [_CONTROL] * 3 + [_UNKNOWN] + [_BYTE] * 256 + [_NORMAL] * 8,
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 3,
            "tokenizer.ggml.add_space_prefix": False,
        }
    return metadata | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": LLAMA_TOKENS,
        "tokenizer.ggml.token_type": [_NORMAL] * (len(LLAMA_TOKENS) - 2) + [_CONTROL] * 2,
        "tokenizer.ggml.merges": LLAMA_MERGES,
        "tokenizer.ggml.bos_token_id": len(LLAMA_TOKENS) - 2,
        "tokenizer.ggml.eos_token_id": len(LLAMA_TOKENS) - 1,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(
    path: Path,
    arch: str = "llama",
    quant: str = "F32",
    *,
    hidden: int = 32,
    layers: int = 2,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[str, tuple[int, ...]] | None] | None = None,
    seed: int = 0,
) -> dict[str, tuple[str, np.ndarray]]:
    """Writes a model whose matrices are of type ``quant`` and whose norms are F32. → name: (type, stored bytes).

    metadata, tensors: what to add or to change, None removes; a tensor is (type, shape, rows first).
    """
    rng = np.random.default_rng(seed)
    entries = {**metadata_of(arch, hidden, layers), **(metadata or {})}
    vocab = len(GEMMA_TOKENS if arch == "gemma3" else LLAMA_TOKENS)
    shapes = tensor_shapes(arch, hidden, layers, vocab)
    wanted: dict[str, Any] = {n: ("F32" if len(shape) == 1 else quant, shape) for n, shape in shapes.items()}
    writer = GGUFWriter(path, arch)
    for key, value in entries.items():
        if value is not None:
            _add(writer, key, value)
    stored = {}
    for name, what in {**wanted, **(tensors or {})}.items():
        if what is None:
            continue
        kind, shape = what
        data = random_rows(rng, kind, int(np.prod(shape[:-1])), shape[-1])
        stored[name] = (kind, data)
        writer.add_tensor(name, data.reshape(*shape[:-1], -1), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    if isinstance(value, list):
        writer.add_key_value(key, value, GGUFValueType.ARRAY)
    else:
        default = GGUFValueType.INT32 if isinstance(value, int) and value < 0 else GGUFValueType.UINT32
        writer.add_key_value(key, value, kinds.get(type(value), default))


def after(data: bytes | bytearray, name: str) -> int:
    """Offset of what follows a key or a tensor name in a header: a value's type, or a tensor's number of dimensions."""
    text = struct.pack("<Q", len(name)) + name.encode()
    at = data.index(text)
    assert data.find(text, at + 1) < 0
    return at + len(text)


def patch(path: Path, at: int, code: str, value: Any) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(code, data, at, value)
    path.write_bytes(data)
