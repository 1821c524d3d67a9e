"""`prune`: fewer weights. Two of four set to zero by importance, or whole layers left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fastattn.compress.gptq import compensate, output_error
from fastattn.compress.output import check_free
from fastattn.compress.rewrite import (
    CalibrationOptions,
    Job,
    LayerInputs,
    Rewriter,
    calibration_tokens,
    choose_output_dtype,
    choose_walk,
    rewrite_model,
)
from fastattn.compress.sources import Model, open_plain
from fastattn.compress.walk import LayerWalk, Product
from fastattn.models.config import ModelConfig

METHODS = ("magnitude", "wanda", "sparsegpt", "layers")
_GROUP, _KEPT = 4, 2


@dataclass(frozen=True)
class PruneOptions:
    """method: "wanda" zeroes two of each four weights of a row, those with the least |W|·‖x‖ (Sun et al., 2023); "sparsegpt"
    too, and changes those that stay to make up for it (Frantar and Alistarh, 2023); "magnitude" those with the least |W|,
    without a text: what the others are measured by. "layers" leaves out the ``drop`` layers that change their input least
    (Men et al., 2024).

    keep_first, keep_last: layers at the ends that "layers" may not leave out. The rest is as in QuantizeOptions.
    """

    method: str = "wanda"
    drop: int = 0
    keep_first: int = 1
    keep_last: int = 1
    damp: float = 0.01
    dtype: str = "auto"
    device: str = "auto"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, allowed are {', '.join(METHODS)}")
        if self.method == "layers" and self.drop < 1:
            raise ValueError(f"drop is {self.drop}, allowed is from 1: method 'layers' wants to know how many")
        if self.method != "layers" and self.drop:
            raise ValueError(f"drop is {self.drop}, but only method 'layers' drops any")
        for name in ("keep_first", "keep_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed is from 0")
        if not 0 < self.damp <= 1:
            raise ValueError(f"damp is {self.damp!r}, allowed is above 0, up to 1")


def prune(
    model: Model,
    out: str | Path,
    options: PruneOptions | None = None,
    *,
    force: bool = False,
    show_progress: bool = False,
) -> Path:
    """Writes ``model`` pruned into the folder ``out``, with plain weights: a smaller model, or one with zeros that `distill`
    keeps. Resumes, and raises, as `quantize` does."""
    options = options or PruneOptions()
    check_free(Path(out), force)
    source = open_plain(model)
    dtype = choose_output_dtype(source, options.dtype)
    walk = choose_walk(source, options.device, options.calibration.length)
    method: dict[str, Any] = {"method": options.method}
    calibration = None if options.method == "magnitude" else calibration_tokens(source, options.calibration)
    if options.method == "layers":
        assert calibration is not None
        influence = block_influence(walk, calibration[1], show_progress)
        kept = layers_to_keep(influence, options)
        method |= {"drop": options.drop, "block_influence": [round(value, 6) for value in influence]}
        job = Job("prune", method, Path(out), force, kept, show_progress)
        return rewrite_model(source, job, Rewriter(source.config, dtype), walk, calibration)
    if options.method == "sparsegpt":
        method["damp"] = options.damp
    check_widths(walk)
    job = Job("prune", method | {"pattern": f"{_KEPT}:{_GROUP}"}, Path(out), force, show_progress=show_progress)
    return rewrite_model(source, job, Sparsifier(source.config, dtype, options), walk, calibration)


def check_widths(walk: LayerWalk) -> None:
    c = walk.config
    for name, size in (("hidden_size", c.hidden_size), ("intermediate_size", c.intermediate_size)):
        if size % _GROUP:
            raise ValueError(f"{name} is {size}, expected a multiple of {_GROUP} to keep {_KEPT} of each {_GROUP}")


# ---- 2 of 4 ----


def wanda_mask(weight: Tensor, input_norm: Tensor) -> Tensor:
    """True for the two of each four neighbours in a row with the largest |W_ij| · ‖x_j‖. weight (N, K), input_norm (K,)."""
    return keep_largest(weight.abs() * input_norm)


def keep_largest(score: Tensor) -> Tensor:
    """True for the two largest of each four neighbours in a row; of equals the first. (N, K) → (N, K) bool."""
    grouped = score.reshape(score.shape[0], -1, _GROUP)
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., :_KEPT]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).flatten(1)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether a matrix has at most two numbers other than zero in each four neighbours of a row."""
    if weight.dim() != 2 or weight.shape[1] % _GROUP:
        return False
    return not bool((weight.detach() * ~keep_largest(weight.detach().abs())).any())


def sparsegpt(weight: Tensor, hessian: Tensor, damp: float) -> Tensor:
    """The weight with two of each four zero, the others changed to make up for it. In each four those stay whose loss,
    w² / U_jj², would cost most once later columns have done what they can."""
    keep = torch.empty(0)

    def rounder(rest: Tensor, column: int, pivots: Tensor) -> Tensor:
        nonlocal keep
        if column % _GROUP == 0:
            keep = keep_largest((rest[:, :_GROUP] / pivots[:_GROUP]).square())
        return rest[:, 0] * keep[:, column % _GROUP]

    return compensate(weight, hessian, rounder, damp=damp, reorder=False)


class Sparsifier(Rewriter):
    """Two of each four weights of the layers' matrices become zero."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, options: PruneOptions) -> None:
        super().__init__(config, dtype)
        self.options = options
        self.needs_inputs = options.method != "magnitude"

    def rewrite(
        self, weights: dict[str, Tensor], products: Sequence[Product], inputs: Mapping[str, LayerInputs]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        errors: dict[str, float] = {}
        pruned = dict(weights)
        for product in products:
            weight = product.stack(weights)
            if inputs:
                hessian = inputs[product.path].hessian.matrix
            else:  # magnitude: Wanda, where every input counts the same
                hessian = torch.eye(weight.shape[1], device=weight.device)
            if self.options.method == "sparsegpt":
                sparse = sparsegpt(weight, hessian, self.options.damp)
            else:
                sparse = weight * wanda_mask(weight, hessian.diagonal().sqrt())
            errors[product.path] = output_error(weight, sparse, hessian)
            pruned |= {f"{name}.weight": part for name, part in product.split(sparse, weights).items()}
        return self.plain(pruned), {"output_error" if inputs else "weight_error": errors}


# ---- layers ----


def block_influence(walk: LayerWalk, tokens: Tensor, show_progress: bool = False) -> list[float]:
    """1 − the mean cosine between each layer's input and output: how much a layer does (ShortGPT, Men et al., 2024)."""
    states, found = walk.embed(tokens), []
    layers = range(walk.num_layers)
    for index in tqdm(layers, desc="Layers, their influence", unit="layer", disable=None if show_progress else True):
        with walk.layer(index) as layer:
            walk.fill(layer, index, walk.read(index))
            after = walk.run(layer, index, states)
        found.append(1 - float(functional.cosine_similarity(states.float(), after.float(), dim=-1).mean()))
        states = after
    return found


def layers_to_keep(influence: Sequence[float], options: PruneOptions) -> tuple[int, ...]:
    """All but the ``drop`` layers of least influence between the protected ends."""
    free = range(options.keep_first, len(influence) - options.keep_last)
    if options.drop > len(free) or options.drop >= len(influence):
        raise ValueError(
            f"drop is {options.drop}, allowed is up to {min(len(free), len(influence) - 1)} for this model"
        )
    dropped = set(sorted(free, key=lambda index: influence[index])[: options.drop])
    return tuple(index for index in range(len(influence)) if index not in dropped)
