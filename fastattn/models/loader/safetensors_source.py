"""Models in Hugging Face's layout: a folder with config.json, tokenizer.json and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as Pipeline

from fastattn.models.config import ModelConfig, config_from_hf
from fastattn.models.loader.copier import Copier
from fastattn.models.loader.errors import ModelFileError
from fastattn.models.loader.source import CODE_TYPES, TensorInfo, expected_shape
from fastattn.models.tokenizer import Tokenizer
from fastattn.nn import Shard

_FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
_BYTES = _FLOATS | CODE_TYPES
_INDEX = "model.safetensors.index.json"
_MAX_JSON = 256 << 20


class SafetensorsSource:
    """The library checks each file's header against its size; what the folder's JSON files say is checked here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._config = config_from_hf(_read_json(folder / "config.json"))
        except ModelFileError:  # a ValueError that names the file already
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{folder / 'config.json'}: {error}") from None
        self._files: dict[str, Any] = {}  # tensor name → its open file, which is mapped and not read
        self._tensors: dict[str, TensorInfo] = {}
        for path, names in self._shards().items():
            self._open(path, names)

    @property
    def name(self) -> str:
        return str(self._folder)

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, out: torch.Tensor, shard: Shard | None = None, copier: Copier | None = None) -> None:
        info = self._tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self._folder}: tensor {name} is missing")
        if (expected := expected_shape(out, shard)) != info.shape:
            raise ModelFileError(f"{self._folder}: tensor {name} has shape {info.shape}, expected {expected}")
        if shard is None or shard.length == shard.total:
            stored = self._files[name].get_tensor(name)
        else:
            stored = self._files[name].get_slice(name)[shard.slices]
        if out.dtype is torch.uint8 and stored.itemsize == 1:
            stored = stored.view(torch.uint8)  # scales in 8 bits are handed on as their bits
        elif out.is_floating_point() == info.is_codes:
            raise ModelFileError(f"{self._folder}: tensor {name} is {info.dtype}, which is not read as {out.dtype}")
        (copier or Copier()).copy(out, stored)

    def tokenizer(self) -> Tokenizer:
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFileError(f"{path}: no such file; a tokenizer in another format is not read")
        try:
            pipeline = Pipeline.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelFileError(f"{path}: {error}") from None
        settings_path = self._folder / "tokenizer_config.json"
        settings = _read_json(settings_path) if settings_path.is_file() else {}
        bos = self._config.bos_token_id
        # What the pipeline adds around an empty text is what the model was trained to see.
        around = pipeline.encode("", add_special_tokens=True).ids
        add_bos = settings.get("add_bos_token")
        add_eos = settings.get("add_eos_token")
        return Tokenizer(
            pipeline,
            bos_token_id=bos,
            eos_token_ids=self._eos_token_ids(),
            add_bos=bool(bos in around[:1] if add_bos is None else add_bos),
            add_eos=bool(add_eos),
            chat_template=self._chat_template(settings),
        )

    def _eos_token_ids(self) -> tuple[int, ...]:
        path = self._folder / "generation_config.json"
        found = _read_json(path).get("eos_token_id") if path.is_file() else None
        if found is None:
            return self._config.eos_token_ids
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and 0 <= i < self._config.vocab_size for i in ids):
            raise ModelFileError(f"{path}: eos_token_id is {found!r}, expected ids below {self._config.vocab_size}")
        return tuple(ids)

    def _chat_template(self, settings: Mapping[str, Any]) -> str | None:
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        template = settings.get("chat_template")
        if isinstance(template, list):  # named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def _shards(self) -> dict[Path, set[str] | None]:
        """File → the tensors that it must hold; None: whatever is in it."""
        single = self._folder / "model.safetensors"
        index = self._folder / _INDEX
        if not index.is_file():
            if not single.is_file():
                raise ModelFileError(f"{self._folder}: holds neither model.safetensors nor {_INDEX}")
            return {single: None}
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{index}: weight_map is missing or empty")
        shards: dict[Path, set[str] | None] = {}
        for tensor, file in weight_map.items():
            # A name and nothing else: a path could lead out of the folder.
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelFileError(f"{index}: tensor {tensor} is in {file!r}, expected a .safetensors file name")
            names = shards.setdefault(self._folder / file, set())
            assert names is not None
            names.add(tensor)
        return shards

    def _open(self, path: Path, names: set[str] | None) -> None:
        if not path.is_file():
            raise ModelFileError(f"{path}: no such file, but {_INDEX} names it")
        try:
            file = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{path}: {error}") from None
        stored = set(file.keys())  # type: ignore[no-untyped-call]
        if missing := sorted((names or set()) - stored):
            raise ModelFileError(f"{path}: tensor {missing[0]} is missing, but {_INDEX} says it is there")
        for name in sorted(stored if names is None else names):
            piece = file.get_slice(name)  # type: ignore[no-untyped-call]
            dtype, shape = str(piece.get_dtype()), tuple(piece.get_shape())
            if dtype not in _BYTES:
                raise ModelFileError(f"{path}: tensor {name} is {dtype}, supported are {', '.join(_BYTES)}")
            numel = 1
            for size in shape:
                numel *= size
            self._tensors[name] = TensorInfo(shape, dtype, numel * _BYTES[dtype])
            self._files[name] = file


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path}: has {path.stat().st_size} bytes, allowed are {_MAX_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: expected a JSON object")
    return value
