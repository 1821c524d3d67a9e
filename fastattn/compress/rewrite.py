"""Reads a model, changes it layer by layer, writes it as a folder: what quantizing, pruning and plain export share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastattn.compress.gptq import Hessian
from fastattn.compress.hf_folder import folder_files, stores_norms_minus_one
from fastattn.compress.kv_scales import stored_kv_scales, with_kv_cache_scheme
from fastattn.compress.output import OutputFolder, check_free
from fastattn.compress.receipt import source_digest, versions
from fastattn.compress.text import Corpus, load_corpus, token_windows
from fastattn.compress.walk import LayerWalk, Product
from fastattn.engine.device import choose_device
from fastattn.models.config import ModelConfig
from fastattn.models.loader import ModelSource

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class CalibrationOptions:
    """files: text; none is the built-in one. samples windows of length tokens are run through the model."""

    files: tuple[str, ...] = ()
    samples: int = 64
    length: int = 512

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"calibration: {name} is {value!r}, allowed is an integer from {least}")


@dataclass
class LayerInputs:
    """What calibration saw of a product's inputs. amax (K,): the largest magnitude of each column."""

    hessian: Hessian
    amax: Tensor

    def add(self, inputs: Tensor) -> None:
        self.hessian.add(inputs)
        torch.maximum(self.amax, inputs.float().abs().amax(0), out=self.amax)


class Rewriter:
    """How a layer changes. This one does not change it: it is the plain export.

    dtype: of the weights that stay plain.
    """

    needs_inputs = False

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._norm_offset = 1.0 if stores_norms_minus_one(config) else 0.0

    def rewrite(
        self, weights: dict[str, Tensor], products: Sequence[Product], inputs: Mapping[str, LayerInputs]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A layer's weights, fp32 → the tensors to store, and what the receipt says of them. inputs: by the products' paths."""
        return self.plain(weights), {}

    def plain(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights as they are stored when nothing is done to them."""
        return {name: self.to_stored(name, tensor) for name, tensor in weights.items()}

    def to_stored(self, name: str, tensor: Tensor) -> Tensor:
        stored = (tensor - (self._norm_offset if name.endswith("norm.weight") else 0)).to(self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"tensor {name} holds numbers too large for dtype {str(self.dtype).removeprefix('torch.')!r}"
            )
        return stored

    def from_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `rewrite`, as the engine will see it: name → fp32 values."""
        return {
            name: t.float() + (self._norm_offset if name.endswith("norm.weight") else 0) for name, t in stored.items()
        }

    def quantization_config(self) -> dict[str, Any] | None:
        return None


@dataclass(frozen=True)
class Job:
    """What is written where. method: what the receipt calls it, and what makes two runs the same job. kept: the layers that
    the output has, by their numbers in the source."""

    command: str
    method: Mapping[str, Any]
    out: Path
    force: bool = False
    kept: tuple[int, ...] | None = None
    show_progress: bool = False


def choose_output_dtype(source: ModelSource, dtype: str) -> torch.dtype:
    """ "auto" is what the source's matrices are stored in, and bfloat16 for a GGUF file of fewer bits."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}, allowed are 'auto', {', '.join(map(repr, _DTYPES))}")
        return _DTYPES[dtype]
    kinds = {info.dtype for info in source.tensors().values() if len(info.shape) == 2}
    return _STORED.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16


def choose_walk(source: ModelSource, device: str, length: int) -> LayerWalk:
    chosen = choose_device(device)
    dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    return LayerWalk(source, chosen, dtype, min(length, source.config.max_position_embeddings))


def calibration_tokens(source: ModelSource, options: CalibrationOptions) -> tuple[Corpus, Tensor]:
    limit = source.config.max_position_embeddings
    if options.length > limit:
        raise ValueError(f"calibration: length is {options.length}, allowed is up to {limit} for this model")
    corpus = load_corpus(options.files, "calibration")
    return corpus, token_windows(corpus, source.tokenizer(), options.length, options.samples)


def rewrite_model(
    source: ModelSource, job: Job, rewriter: Rewriter, walk: LayerWalk, calibration: tuple[Corpus, Tensor] | None = None
) -> Path:
    """Runs the job, or goes on with it where it was interrupted. Each layer is calibrated on what the layers before it give
    as they were rewritten, so that it can make up for them; if the rewriter wants no inputs, the receipt names the text only."""
    started = time.monotonic()
    check_free(job.out, job.force, source.name)
    kept = job.kept if job.kept is not None else tuple(range(source.config.num_layers))
    digest = source_digest(source)
    described: dict[str, Any] = {
        "command": job.command,
        "source": digest,
        "method": dict(job.method),
        "layers": list(kept),
    }
    described["dtype"] = str(rewriter.dtype).removeprefix("torch.")
    tokens = None
    if calibration is not None:
        corpus, tokens = calibration
        described["calibration"] = {"text": corpus.name, "digest": corpus.digest, "windows": list(tokens.shape)}
    with OutputFolder(job.out, described | {"versions": versions()}, len(kept) + 2, job.force) as folder:
        _write_layers(folder, rewriter, walk, kept, tokens if rewriter.needs_inputs else None, job.show_progress)
        config = replace(
            source.config,
            num_layers=len(kept),
            layer_is_sliding=tuple(source.config.layer_is_sliding[i] for i in kept),
        )
        quantization = with_kv_cache_scheme(rewriter.quantization_config(), source)
        files = folder_files(source, config, rewriter.dtype, quantization)
        records = [record for record in folder.records() if record]
        receipt = {
            **described,
            "source": {"name": Path(source.name).name, "digest": digest, "architecture": config.architecture},
            "versions": versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **({} if folder.resumed else {"seconds": round(time.monotonic() - started, 1)}),
            "bytes": {"before": sum(info.nbytes for info in source.tensors().values())},
            "records": records,
        }
        return folder.finish(files, receipt)


def _write_layers(
    folder: OutputFolder,
    rewriter: Rewriter,
    walk: LayerWalk,
    kept: Sequence[int],
    tokens: Tensor | None,
    show_progress: bool,
) -> None:
    last = len(kept) + 1
    if not folder.has_shard(0):
        folder.write_shard(0, rewriter.plain(walk.read_top(("model.embed_tokens.",))), {})
    states = walk.embed(tokens) if tokens is not None and not folder.has_shard(last) else None
    layers = list(enumerate(kept, 1))
    for shard, index in tqdm(layers, desc="Layers", unit="layer", disable=None if show_progress else True):
        if folder.has_shard(shard) and states is None:
            continue
        with walk.layer(index) as layer:
            if not folder.has_shard(shard):
                stored, record = _rewrite_layer(rewriter, walk, layer, index, states)
                if shard != index + 1:
                    stored = {_renumber(name, shard - 1): tensor for name, tensor in stored.items()}
                folder.write_shard(shard, stored, {"layer": shard - 1, **record} if record else {})
            if states is not None and shard < last - 1:
                stored = {
                    _renumber(name, index): tensor.to(walk.device) for name, tensor in folder.read_shard(shard).items()
                }
                walk.fill(layer, index, rewriter.from_stored(stored))
                states = walk.run(layer, index, states)
    if not folder.has_shard(last):
        folder.write_shard(last, rewriter.plain(walk.read_top(("model.norm.", "lm_head."))), {})


def _rewrite_layer(
    rewriter: Rewriter, walk: LayerWalk, layer: Any, index: int, states: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights, products = walk.read(index), walk.products(index)
    inputs: dict[str, LayerInputs] = {}
    if states is not None and rewriter.needs_inputs:
        for product in products:
            size = weights[f"{product.names[0]}.weight"].shape[1]
            zeros = torch.zeros(size, device=walk.device)
            inputs[product.path] = LayerInputs(Hessian(size, walk.device), zeros)
        walk.fill(layer, index, weights)
        walk.run(layer, index, states, {path: seen.add for path, seen in inputs.items()})
    stored, record = rewriter.rewrite(weights, products, inputs)
    return stored | stored_kv_scales(walk.source, index), record


def _renumber(name: str, index: int) -> str:
    """The name that a layer's tensor has when the layer is number ``index``."""
    model, layers, _, rest = name.split(".", 3)
    return f"{model}.{layers}.{index}.{rest}"
