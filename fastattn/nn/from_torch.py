"""What our layers take of torch's, and which of those they are not the same as."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.ops.checks import FLOAT


def linear_tensors(layer: str, name: str, module: object) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, without gradients, of torch's Linear, also of one whose weight is computed (torch.nn.utils.parametrize).

    layer, name: ours, and its argument, for messages. Raises TypeError for what is not that layer or computes something else,
    ValueError for one that cannot be had as it is.
    """
    if not isinstance(module, torch.nn.Linear):
        raise TypeError(f"{layer}: {name} is a {type(module).__name__}, expected torch.nn.Linear")
    if isinstance(module.weight, torch.nn.UninitializedParameter):
        raise ValueError(f"{layer}: {name} has no weight yet, expected a layer that was called once")
    check_forward(layer, name, module, torch.nn.Linear)
    weight, bias = module.weight.detach(), module.bias
    if weight.dtype not in FLOAT.cpu:  # fp32 on a GPU, too: the layer may be on its way to another dtype
        raise TypeError(f"{layer}: {name}.weight is {weight.dtype}, expected {' or '.join(map(str, FLOAT.cpu))}")
    return weight, None if bias is None else bias.detach()


def check_forward(layer: str, name: str, module: torch.nn.Module, *kinds: type[torch.nn.Module]) -> None:
    """Raises for a module, one of torch's `kinds`, whose result is not that of the kind alone: ours would give another, and say nothing."""
    kind = next(kind for kind in kinds if isinstance(module, kind))
    if type(module).forward is not kind.forward or "forward" in vars(module):
        raise TypeError(
            f"{layer}: {name} is a {type(module).__name__} with a forward of its own, expected that of torch.nn.{kind.__name__}"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{layer}: {name} has forward hooks, expected none: the layer made of it would not call them")


def norm_eps(norm: torch.nn.RMSNorm | torch.nn.LayerNorm, weight: Tensor) -> float:
    """The norm's eps, in front of a layer with this weight, whose dtype is x's.

    What torch takes where there is none is its version's choice: the eps of x's dtype, or that of fp32, in which it computes. A row
    whose squares are far between the two says which.
    """
    if norm.eps is not None:
        return norm.eps
    own, wide = torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps
    device = "cpu" if weight.is_meta else weight.device
    row = torch.full((1, 8), 2.0**-7, dtype=weight.dtype, device=device)
    return wide if functional.rms_norm(row, (8,))[0, 0].item() > 0.5 else own
