"""GGUF files that are cut, flipped or made up: an error of ours or an answer, never another exception and never a signal."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from fastattn.models.loader import ModelFileError, open_model
from fastattn.models.loader.gguf_blocks import BLOCK_TYPES
from fastattn.models.loader.gguf_source import SUPPORTED_TYPES
from fastattn.models.registry import load_model

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 256, 4, 2, 256, 1
# Bytes 33 to 126 stand for themselves in byte-level BPE; one merge, an end token.
TOKENS = [chr(i) for i in range(33, 127)] + ["ab", "<|end|>"]
SHAPES = {
    "token_embd.weight": (len(TOKENS), HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (MLP, HIDDEN),
    "blk.0.ffn_up.weight": (MLP, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, MLP),
}


def stored(shape: tuple[int, ...], kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Bytes of a tensor of that type; any bytes are one, so a quantized one may be drawn."""
    if kind is Kind.F32:
        return rng.standard_normal(shape).astype(np.float32)
    if kind is Kind.F16:
        return rng.standard_normal(shape).astype(np.float16)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block_size * block_bytes), dtype=np.uint8)
    return data & 0x3B if kind is Kind.BF16 else data  # no infinities


def write(path: Path, kind: Kind = Kind.Q8_0, edit: Callable[[gguf.GGUFWriter], None] | None = None) -> dict[str, Any]:
    """A tiny Llama. Returns what was stored of each matrix."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(TOKENS) - 1)
    if edit is not None:
        edit(writer)
    kept: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        own = Kind.F32 if len(shape) == 1 else kind
        kept[name] = stored(shape, own, rng)
        writer.add_tensor(name, kept[name], raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def read_all(path: Path) -> None:
    source = open_model(path)
    source.tokenizer().encode("abc")
    load_model(source, torch.device("cpu"), torch.float32, 32)


@pytest.mark.parametrize("name", SUPPORTED_TYPES)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of random scales
def test_each_type_is_decoded_as_the_format_says(name: str, tmp_path: Path) -> None:
    path, kind = tmp_path / "m.gguf", Kind[name]
    kept = write(path, kind)
    source = open_model(path)
    assert source.tensors()["model.embed_tokens.weight"].dtype == name
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "blk.0.attn_v.weight"),
    ):
        data = kept[theirs]
        right = torch.from_numpy(
            data.astype(np.float32) if data.dtype != np.uint8 else gguf.quants.dequantize(data, kind)
        ).reshape(SHAPES[theirs])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.full((SHAPES[theirs][0], SHAPES[theirs][1] + 3), 7.0, dtype=dtype)
            source.read(ours, out[:, : SHAPES[theirs][1]])
            assert torch.equal(out[:, : SHAPES[theirs][1]].nan_to_num(), right.to(dtype).nan_to_num()), (ours, dtype)
            assert (out[:, SHAPES[theirs][1] :] == 7).all()
    # llama.cpp stores a Llama's q and k with the halves of each head interleaved
    data = kept["blk.0.attn_q.weight"]
    q = torch.from_numpy(data.astype(np.float32) if data.dtype != np.uint8 else gguf.quants.dequantize(data, kind))
    out = torch.empty(HIDDEN, HIDDEN)
    source.read("model.layers.0.self_attn.q_proj.weight", out)
    halves = q.reshape(HEADS, HIDDEN // HEADS // 2, 2, HIDDEN).transpose(1, 2).reshape(HIDDEN, HIDDEN)
    assert torch.equal(out.nan_to_num(), halves.nan_to_num())


def test_sizes_of_blocks_are_the_formats() -> None:
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    ours = {number: (kind.name, kind.numbers, kind.nbytes) for number, kind in BLOCK_TYPES.items()}
    assert ours.items() >= theirs.items()  # an older package knows fewer


def test_a_whole_file_loads(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    read_all(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [Kind.IQ2_XS, Kind.IQ3_S, Kind.Q8_K, Kind.TQ1_0])
def test_types_that_are_not_read_are_named(kind: Kind, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", kind)
    with pytest.raises(ModelFileError, match=rf"token_embd\.weight has type {kind.name}, supported are F32, F16"):
        open_model(tmp_path / "m.gguf")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_damage(tmp_path: Path) -> None:
    """500 cuts and 2,000 flipped bits, most of them in the header."""
    path = tmp_path / "m.gguf"
    write(path, Kind.Q4_0)
    whole = path.read_bytes()
    header = whole.index(b"blk.0.ffn_down.weight") + 64
    rng = random.Random(0)
    refused, messages = 0, set()
    for case in range(2500):
        data = bytearray(whole)
        if case < 500:
            data = data[: rng.randrange(header if case % 2 else len(whole))]
        else:
            bit = rng.randrange(8 * (header if case % 8 else len(whole)))
            data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            read_all(path)
        except (ModelFileError, ValueError) as error:
            messages.add(str(error))
            refused += 1
    assert refused > 1200
    assert all(("m.gguf" in message or "ModelConfig" in message) and "\n" not in message for message in messages)


def key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def replaced(whole: bytes, old: bytes, new: bytes) -> bytes:
    assert whole.count(old) >= 1, old
    return whole.replace(old, new, 1)


U64_MAX = struct.pack("<Q", 2**64 - 1)
MADE_UP: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda b: b"", "cannot be read"),
    "magic": (lambda b: b"GGML" + b[4:], r"begins with b'GGML', expected b'GGUF'"),
    "version 1": (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version is 1, supported are 2 and 3"),
    "big endian": (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version is 50331648"),
    "tensor count": (lambda b: b[:8] + U64_MAX + b[16:], "number of tensors is 18446744073709551615"),
    "entry count": (lambda b: b[:16] + U64_MAX + b[24:], "number of metadata entries is 18446744073709551615"),
    "key length": (lambda b: b[:24] + U64_MAX + b[32:], "length of a metadata key"),
    "key not UTF-8": (lambda b: b[:32] + b"\xff" + b[33:], "not UTF-8"),
    "tensor outside": (
        lambda b: b[: len(b) - 4096],
        "ends at byte .* the file has",
    ),
    "value type": (
        lambda b: replaced(b, key("llama.context_length") + b"\4\0\0\0", key("llama.context_length") + b"\x63\0\0\0"),
        "type of metadata 'llama.context_length' is 99",
    ),
    "no heads": (
        lambda b: replaced(
            b,
            key("llama.attention.head_count") + b"\4\0\0\0\4\0\0\0",
            key("llama.attention.head_count") + b"\4\0\0\0\0\0\0\0",
        ),
        "num_heads is 0|head_dim",
    ),
    "another architecture": (
        lambda b: replaced(b, key("llama") + b"", key("lhama")),
        "general.architecture is 'lhama'",
    ),
    "dimensions": (
        lambda b: replaced(
            b,
            key("blk.0.attn_norm.weight") + struct.pack("<I", 1),
            key("blk.0.attn_norm.weight") + struct.pack("<I", 9),
        ),
        "has 9 dimensions, allowed is 1 to 4",
    ),
    "unknown type": (
        lambda b: replaced(
            b,
            key("output_norm.weight") + struct.pack("<IQI", 1, HIDDEN, 0),
            key("output_norm.weight") + struct.pack("<IQI", 1, HIDDEN, 4242),
        ),
        "output_norm.weight has unknown type 4242",
    ),
    "no such tensor": (lambda b: replaced(b, b"blk.0.ffn_up", b"blk.0.ffn_xp"), "ffn_xp.weight is unknown"),
    "tensor twice": (lambda b: replaced(b, b"blk.0.attn_k.", b"blk.0.attn_v."), "attn_v.weight stands twice"),
}


@pytest.mark.parametrize("what", MADE_UP)
def test_what_is_wrong_is_named(what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    change, says = MADE_UP[what]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelFileError, match=says) as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_wrong_shapes_and_missing_tensors_are_named_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    whole = path.read_bytes()
    old = struct.pack("<Q", HIDDEN) + struct.pack("<Q", MLP)
    shape = key("blk.0.ffn_up.weight") + struct.pack("<I", 2)
    path.write_bytes(replaced(whole, shape + old, shape + struct.pack("<QQ", HIDDEN, MLP // 2)))
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \(128, 256\), expected \(256, 256\)"):
        read_all(path)
    path.write_bytes(replaced(whole, b"blk.0.ffn_up", b"blk.3.ffn_up"))
    with pytest.raises(ValueError, match=r"1 tensors are missing, first 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        read_all(path)
