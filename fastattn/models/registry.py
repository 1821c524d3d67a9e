"""Which class runs which architecture, and how a model gets its weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from fastattn import nn
from fastattn.models.config import ModelConfig
from fastattn.models.decoder import DecoderModel
from fastattn.models.gemma3 import Gemma3ForCausalLM
from fastattn.models.llama import LlamaForCausalLM
from fastattn.models.loader.copier import copier_to
from fastattn.models.loader.kv_scales import is_kv_scale

if TYPE_CHECKING:
    from fastattn.models.loader import ModelSource

logger = logging.getLogger("fastattn.models")

ARCHITECTURES: dict[str, type[LlamaForCausalLM] | type[Gemma3ForCausalLM]] = {
    "llama": LlamaForCausalLM,
    "mistral": LlamaForCausalLM,
    "qwen2": LlamaForCausalLM,
    "qwen3": LlamaForCausalLM,
    "gemma3": Gemma3ForCausalLM,
}


def build_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, max_model_len: int, tp: nn.TensorParallel = nn.ALONE
) -> DecoderModel:
    """An uninitialized model, or a rank's part of it, on ``device`` in ``dtype``."""
    return _allocate(build_meta(config, max_model_len, tp), device, dtype)


def build_meta(
    config: ModelConfig, max_model_len: int, tp: nn.TensorParallel = nn.ALONE, batch_invariant: bool = False
) -> DecoderModel:
    """The model without memory for its weights. batch_invariant: see `DecoderModel.make_batch_invariant`."""
    if config.architecture not in ARCHITECTURES:
        raise ValueError(f"model: architecture is {config.architecture!r}, supported are {sorted(ARCHITECTURES)}")
    with torch.device("meta"):
        model = ARCHITECTURES[config.architecture](config, max_model_len, tp)
        if config.quantization is not None:
            for name, layer in model.linears():
                layer.quantize([config.quantization.scheme(piece.name) for piece in layer.pieces(name)])
        if batch_invariant:
            model.make_batch_invariant()
        return model


def _allocate(model: DecoderModel, device: torch.device, dtype: torch.dtype) -> DecoderModel:
    # Everything is allocated once, at its final place; the rotary tables are real already and stay fp32.
    for module in model.modules():
        fixed = module.fixed_dtypes if isinstance(module, nn.QuantizedWeight) else ()
        for name, weight in list(module.named_parameters(recurse=False)):
            own = weight.dtype if name in fixed or not weight.is_floating_point() else dtype
            empty = torch.empty(weight.shape, dtype=own, device=device)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))
    for name, table in list(model.named_buffers()):
        setattr(model, name, table.to(device))
    return model.eval()


def loaded_bytes(meta: DecoderModel, dtype: torch.dtype, device_type: str) -> dict[torch.dtype, int]:
    """What the weights of a model without memory take once they are loaded, by dtype. The rotary tables are not weights."""
    found: dict[torch.dtype, int] = {}
    for module in meta.modules():
        if isinstance(module, torch.nn.ParameterList):  # what a quantized weight is made from, and then gone
            continue
        if isinstance(module, nn.QuantizedWeight):
            own = module.loaded_bytes(dtype, device_type)
        else:
            own = {dtype: sum(w.numel() for _, w in module.named_parameters(recurse=False)) * dtype.itemsize}
        for kind, nbytes in own.items():
            if nbytes:
                found[kind] = found.get(kind, 0) + nbytes
    return found


def load_model(
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int,
    show_progress: bool = False,
    tp: nn.TensorParallel = nn.ALONE,
    batch_invariant: bool = False,
) -> DecoderModel:
    """Builds the model of ``source`` and decodes each stored tensor, or this rank's part of it, straight into its place: on a GPU,
    where several threads read the file.

    Raises ValueError, before anything is allocated or read, if the file lacks a tensor that the model needs, has one of another shape,
    or has one that the model does not know. Scales of a KV cache are the cache's (`read_kv_scales`).
    """
    meta = build_meta(source.config, max_model_len, tp, batch_invariant)
    wanted = {weight.name: weight for weight in meta.weights()}
    stored = {name: info for name, info in source.tensors().items() if not is_kv_scale(name)}
    if source.config.tie_word_embeddings:
        # Some files repeat the tied matrix; it is the embedding's, and reading it twice would only cost time.
        stored = {name: info for name, info in stored.items() if name != "lm_head.weight"}
    if source.config.quantization is not None:
        unused = source.config.quantization.unused
        stored = {name: info for name, info in stored.items() if not name.endswith(unused)}
        for note in source.config.quantization.notes:
            logger.warning("%s: %s", source.name, note)
    if missing := sorted(set(wanted) - set(stored)):
        raise ValueError(f"{source.name}: {len(missing)} tensors are missing, first {missing[0]!r}")
    if extra := sorted(set(stored) - set(wanted)):
        raise ValueError(
            f"{source.name}: {len(extra)} tensors are unknown to architecture {source.config.architecture!r}, first {extra[0]!r}"
        )
    for name, weight in wanted.items():
        if tuple(stored[name].shape) != weight.full_shape:
            raise ValueError(
                f"{source.name}: {name} has shape {tuple(stored[name].shape)}, expected {weight.full_shape}"
            )
        info = stored[name]
        if info.dtype not in weight.stored_as if weight.stored_as else info.is_codes:
            expected = " or ".join(weight.stored_as or ("a float type",))
            raise ValueError(f"{source.name}: {name} is stored as {info.dtype}, expected {expected}")
    # Only now: a size that a damaged file claims and does not hold must not cost memory.
    model = _allocate(meta, device, dtype)
    total = sum(info.nbytes for info in stored.values())
    with (
        tqdm(
            total=total, unit="B", unit_scale=True, desc="Loading weights", disable=None if show_progress else True
        ) as bar,
        copier_to(device) as copier,
    ):
        for name, out, shard, _ in model.weights():
            if out.numel():
                source.read(name, out, shard, copier)
            bar.update(stored[name].nbytes)
    if source.config.norm_plus_one:
        for name, out, _, _ in model.weights():
            if name.endswith("norm.weight"):
                out.add_(1)
    model.pack()
    return model
