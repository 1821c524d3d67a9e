"""A gated MLP in two products: gates, ups, their activation and, where it is asked for, the norm in front are one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.nn.from_torch import check_forward, linear_tensors, norm_eps
from fastattn.nn.linear import Linear
from fastattn.nn.module import empty_parameter
from fastattn.ops.gated_linear import ACTIVATIONS
from fastattn.reference.gated_linear import interleave_gate_up, split_gate_up
from fastattn.reference.norm_linear import fold_rms_norm

# Modules that transformers' MLPs have as act_fn, by their names: it need not be installed.
_ACTIVATION_OF = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
_ACTIVATION_OF |= {"GELUActivation": "gelu"}


class GatedMLP(torch.nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))`, as in Llama, Qwen and Gemma, in two kernels on Hopper; for inference.

    activation: "silu", "gelu_tanh" or "gelu". norm_eps: x's rows are RMS-normalized first, with this eps and with the norm's
    weight in those of gate and up; None: they are not.

    In memory gate and up are one matrix, rows in turns (`interleave_gate_up`). The state has the names and layouts of
    transformers' modules: gate_proj.weight, up_proj.weight (intermediate_size, hidden_size), down_proj.weight (hidden_size,
    intermediate_size), with bias=True also their biases.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        bias: bool = False,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            expected = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"GatedMLP: activation is {activation!r}, expected one of {expected}")
        self.activation, self.norm_eps = activation, norm_eps

        self.gate_up_weight = empty_parameter(2 * intermediate_size, hidden_size, device=device, dtype=dtype)
        self.gate_up_bias = empty_parameter(2 * intermediate_size, device=device, dtype=dtype) if bias else None
        self.down_proj = Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)
        self.register_state_dict_post_hook(_split_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_interleave_state)  # type: ignore[no-untyped-call]

    @classmethod
    def from_float(cls, mlp: torch.nn.Module, norm: torch.nn.Module | None = None) -> GatedMLP:
        """The layer that does what a gated MLP does, or a norm over the last dimension and the MLP behind it.

        mlp: has gate_proj, up_proj and down_proj, torch's Linear, all with a bias or none, and act_fn, SiLU or GELU, of torch
        or transformers. norm: torch's RMSNorm, or None. Weights are shared where their layout is the same. Raises TypeError
        for other modules, and for those with a forward of their own or another dtype, ValueError for sizes that do not agree and
        for forward hooks.
        """
        tensors = {name: linear_tensors("GatedMLP", f"mlp.{name}", getattr(mlp, name, None)) for name in _NAMES}
        gate, _ = tensors["gate_proj"]
        intermediate, hidden = gate.shape
        for name, expected in (("up_proj", (intermediate, hidden)), ("down_proj", (hidden, intermediate))):
            weight, _ = tensors[name]
            if (found := tuple(weight.shape)) != expected:
                raise ValueError(f"GatedMLP: {name} is {found[1]} → {found[0]}, expected {expected[1]} → {expected[0]}")
            if weight.dtype is not gate.dtype:
                raise TypeError(f"GatedMLP: {name} is {weight.dtype}, expected {gate.dtype} as gate_proj")
        has_bias = {bias is not None for _, bias in tensors.values()}
        if len(has_bias) != 1:
            raise ValueError("GatedMLP: some of gate_proj, up_proj and down_proj have a bias, expected all or none")
        eps, norm_weight = None, None
        if norm is not None:
            eps, norm_weight = _rms_norm_of(norm, gate)
        state = {}
        for name, (weight, bias) in tensors.items():
            folded = norm is not None and name != "down_proj"
            state[f"{name}.weight"] = fold_rms_norm(norm_weight, weight) if folded else weight
            if bias is not None:
                state[f"{name}.bias"] = bias
        made = cls(hidden, intermediate, _activation_of(mlp), has_bias.pop(), eps, "meta", gate.dtype)
        made.load_state_dict(state, assign=True)
        return made.requires_grad_(False).train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, hidden_size) → the same shape, in the weights' dtype."""
        weight, bias = self.gate_up_weight, self.gate_up_bias
        if self.norm_eps is None:
            gated = ops.gated_linear(x, weight, bias, self.activation)
        else:
            gated = ops.rms_norm_gated_linear(x, weight, bias, self.activation, self.norm_eps)
        out: Tensor = self.down_proj(gated)
        return out

    def extra_repr(self) -> str:
        rows, columns = self.gate_up_weight.shape
        bias = self.gate_up_bias is not None
        return f"{columns}, {rows // 2}, activation={self.activation!r}, bias={bias}, norm_eps={self.norm_eps}"


_NAMES = ("gate_proj", "up_proj", "down_proj")


def _activation_of(mlp: torch.nn.Module) -> str:
    act = getattr(mlp, "act_fn", None)
    if isinstance(act, torch.nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    name = type(act).__name__
    if name not in _ACTIVATION_OF:
        raise TypeError(
            f"GatedMLP: mlp.act_fn is a {name}, expected torch.nn.SiLU or GELU, or transformers' SiLU or GELU"
        )
    return _ACTIVATION_OF[name]


def _rms_norm_of(norm: torch.nn.Module, gate: Tensor) -> tuple[float, Tensor | None]:
    if not isinstance(norm, torch.nn.RMSNorm):
        raise TypeError(f"GatedMLP: norm is a {type(norm).__name__}, expected torch.nn.RMSNorm")
    check_forward("GatedMLP", "norm", norm, torch.nn.RMSNorm)
    if tuple(norm.normalized_shape) != (gate.shape[1],):
        raise ValueError(
            f"GatedMLP: norm is over {tuple(norm.normalized_shape)}, expected ({gate.shape[1]},), gate_proj's in_features"
        )
    return norm_eps(norm, gate), None if norm.weight is None else norm.weight.detach()


def _split_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for key in ("weight", "bias"):
        both = state.pop(f"{prefix}gate_up_{key}", None)
        if both is not None:
            state[f"{prefix}gate_proj.{key}"], state[f"{prefix}up_proj.{key}"] = split_gate_up(both)


def _interleave_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    errors: list[str] = others[-1]
    for key in ("weight", "bias"):
        names = f"{prefix}gate_proj.{key}", f"{prefix}up_proj.{key}"
        if not all(name in state for name in names):
            continue  # what is missing will be named
        try:
            both = interleave_gate_up(*(state[name] for name in names))
        except ValueError as error:
            errors.append(str(error))
            continue
        for name in names:
            del state[name]
        state[f"{prefix}gate_up_{key}"] = both
