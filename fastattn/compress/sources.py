"""The models that the tools take: named, in a folder, in a file, or opened already."""

from __future__ import annotations

from pathlib import Path

from fastattn.models.loader import ModelSource, open_model

Model = str | Path | ModelSource


def opened(model: Model) -> ModelSource:
    """Raises ModelFileError, in one line, for what is no model."""
    return open_model(model) if isinstance(model, str | Path) else model


def open_plain(model: Model) -> ModelSource:
    """Opens a model whose weights are plain numbers. Raises ValueError for one that is quantized already."""
    source = opened(model)
    if source.config.quantization is not None:
        raise ValueError(f"{source.name}: is quantized already, expected a model with plain weights")
    return source
