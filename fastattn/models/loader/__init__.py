"""Opens models: named ones, Hugging Face folders, GGUF files."""

from __future__ import annotations

from pathlib import Path

from fastattn.models.loader.errors import ModelFileError
from fastattn.models.loader.source import ModelSource, TensorInfo

__all__ = ["ModelFileError", "ModelSource", "TensorInfo", "open_model"]

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def open_model(name_or_path: str | Path) -> ModelSource:
    """Opens ``smollm2`` or ``gemma3-270m`` (fetched once), a folder with safetensors, or a .gguf file.

    Raises ModelFileError in one line that says what was expected.
    """
    from fastattn.models.loader import hub

    if str(name_or_path) in hub.MODELS:
        path = hub.fetch(str(name_or_path))
    else:
        path = Path(name_or_path).expanduser()
    try:
        exists = path.exists()
    except OSError as error:  # a name too long, a folder that may not be searched
        raise ModelFileError(f"model {str(name_or_path)!r}: {error.strerror}") from None
    if not exists:
        raise ModelFileError(
            f"model {str(name_or_path)!r}: no such file or folder, and the known names are {', '.join(sorted(hub.MODELS))}"
        )
    if path.suffix in _PICKLES:
        raise ModelFileError(f"{path}: pickled weights are programs and are not run, use safetensors or GGUF")
    if path.is_dir():
        from fastattn.models.loader.safetensors_source import SafetensorsSource

        return SafetensorsSource(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path}: is one file of a model, expected the folder that holds its config.json")
    from fastattn.models.loader.gguf_source import GGUFSource

    return GGUFSource(path)
