"""Sentences to vectors, by a small model that lies on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Encoder(Protocol):
    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        """(number of texts, dimension), each row of length 1. Called in one thread."""
        ...


class SentenceEncoder:
    """A folder in sentence-transformers' layout: an encoder of transformers' in safetensors, mean or [CLS] pooling."""

    def __init__(self, folder: Path) -> None:
        try:
            import transformers
        except ImportError:
            raise ImportError("semantic lookup needs transformers: pip install 'fastattn[compress]'") from None
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"encoder {folder}: there is no model.safetensors in it")
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        self._model = transformers.AutoModel.from_pretrained(folder, use_safetensors=True, **options).eval()
        self._takes_first = _pooling(folder) == "cls"
        self._max_length = min(int(self._model.config.max_position_embeddings), 512)

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            batch = self._tokenizer(
                texts, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
            )
            hidden = self._model(**batch).last_hidden_state.float()  # (texts, tokens, dimension)
            mask = batch["attention_mask"][:, :, None].float()  # (texts, tokens, 1)
            pooled = hidden[:, 0] if self._takes_first else (hidden * mask).sum(1) / mask.sum(1)
            return np.asarray(torch.nn.functional.normalize(pooled, dim=1).numpy(), dtype=np.float32)


def _pooling(folder: Path) -> str:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        modes = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"encoder {path}: it is not JSON: {error}") from None
    if modes.get("pooling_mode_mean_tokens"):
        return "mean"
    if modes.get("pooling_mode_cls_token"):
        return "cls"
    raise ValueError(f"encoder {path}: its pooling is not known, known are mean and cls")


def load_encoder(folder: Path) -> Encoder:
    if not folder.is_dir():
        raise ValueError(f"encoder {folder}: there is no such folder")
    return SentenceEncoder(folder)
