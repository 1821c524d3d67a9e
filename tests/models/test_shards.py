"""A rank's part of a tensor is that part of the whole, in each file format, and no more than it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models.loader import ModelFileError, open_model
from fastattn.nn import Shard
from tests.engine.tiny import TinySource, write_folder


def parts(shape: tuple[int, ...]) -> list[Shard]:
    """Cuts at places that no block or tile knows of."""
    found = []
    for dim, total in enumerate(shape):
        for start, end in ((0, total // 3), (total // 3, total - 1), (total - 1, total), (0, total)):
            found.append(Shard(dim, start, end - start, total))
    return found


def check(source: Any, names: list[str]) -> None:
    for name in names:
        shape = source.tensors()[name].shape
        whole = torch.empty(shape)
        source.read(name, whole)
        for shard in parts(shape):
            expected = whole[shard.slices]
            out = torch.full(expected.shape, torch.nan)
            source.read(name, out, shard)
            assert torch.equal(out, expected), (name, shard)


def test_safetensors(tmp_path: Path) -> None:
    source = open_model(write_folder(TinySource(), tmp_path))
    check(source, [name for name in source.tensors() if "layers.1" not in name])
    with pytest.raises(ModelFileError, match=r"has shape \(107, 32\), expected \(107, 16\)"):
        source.read("lm_head.weight", torch.empty(8, 16), Shard(0, 0, 8, 107))


def test_only_the_part_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix that is cut, the library is never asked for all of it."""
    source: Any = open_model(write_folder(TinySource(), tmp_path))
    name, asked = "model.layers.0.mlp.down_proj.weight", []

    class File:
        def __init__(self, file: Any) -> None:
            self._file = file

        def get_slice(self, name: str) -> Any:
            asked.append(name)
            return self._file.get_slice(name)

    monkeypatch.setitem(source._files, name, File(source._files[name]))
    source.read(name, torch.empty(32, 16), Shard(1, 16, 16, 48))
    assert asked == [name]


def test_gguf() -> None:
    """Rows, permuted ones of q and k too, and columns, which are cut in the middle of a quantization block."""
    try:
        source = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    layer = "model.layers.3."
    check(source, [f"{layer}{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")])
    check(source, [f"{layer}input_layernorm.weight"])


def test_gguf_decodes_only_the_blocks_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.models.loader import gguf_source

    try:
        source: Any = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    decoded, decode = 0, gguf_source.decode_blocks

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal decoded
        numbers = decode(*arguments)
        decoded += numbers.numel()
        return numbers

    monkeypatch.setattr(gguf_source, "decode_blocks", counted)
    source.read("model.layers.0.mlp.down_proj.weight", torch.empty(576, 100), Shard(1, 40, 100, 1536))
    assert decoded == 576 * 128  # blocks of 32 from 32 up to 160
    decoded = 0
    source.read("model.layers.0.self_attn.q_proj.weight", torch.empty(192, 576), Shard(0, 384, 192, 576))
    assert decoded == 192 * 576
