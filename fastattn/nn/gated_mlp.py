"""A gated MLP in two products: gates, ups, their activation and, where it is asked for, the norm in front are one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.nn.linear import Linear
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

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.gate_up_weight = parameter(2 * intermediate_size, hidden_size)
        self.gate_up_bias = parameter(2 * intermediate_size) if bias else None
        self.down_proj = Linear(intermediate_size, hidden_size, bias).to(device, dtype)
        self.register_state_dict_post_hook(_split_state)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_interleave_state)  # type: ignore[no-untyped-call]

    @classmethod
    def from_float(cls, mlp: torch.nn.Module, norm: torch.nn.Module | None = None) -> GatedMLP:
        """The layer that does what a gated MLP does, or a norm over the last dimension and the MLP behind it.

        mlp: has gate_proj, up_proj and down_proj, torch's Linear, all with a bias or none, and act_fn, SiLU or GELU, of torch
        or transformers. norm: torch's RMSNorm, or None. Weights are shared where their layout is the same. Raises TypeError
        for other modules, ValueError for sizes that do not agree.
        """
        layers = [_linear_of(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = layers
        hidden, intermediate = gate.in_features, gate.out_features
        for name, layer, expected in (
            ("up_proj", up, (intermediate, hidden)),
            ("down_proj", down, (hidden, intermediate)),
        ):
            found = (layer.out_features, layer.in_features)
            if found != expected:
                raise ValueError(f"GatedMLP: {name} is {found[1]} → {found[0]}, expected {expected[1]} → {expected[0]}")
        has_bias = [layer.bias is not None for layer in layers]
        if len(set(has_bias)) != 1:
            raise ValueError("GatedMLP: some of gate_proj, up_proj and down_proj have a bias, expected all or none")
        eps, state = (
            None,
            {f"{name}.{key}": t for name, layer in zip(_NAMES, layers, strict=True) for key, t in _state(layer)},
        )
        if norm is not None:
            eps, norm_weight = _rms_norm_of(norm, hidden)
            for name in _NAMES[:2]:
                state[f"{name}.weight"] = fold_rms_norm(norm_weight, state[f"{name}.weight"])
        made = cls(hidden, intermediate, _activation_of(mlp), has_bias[0], eps, "meta", gate.weight.dtype)
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


def _state(layer: torch.nn.Linear) -> list[tuple[str, Tensor]]:
    return [(key, t.detach()) for key, t in layer.named_parameters()]


def _linear_of(mlp: torch.nn.Module, name: str) -> torch.nn.Linear:
    layer = getattr(mlp, name, None)
    if not isinstance(layer, torch.nn.Linear):
        raise TypeError(f"GatedMLP: mlp.{name} is a {type(layer).__name__}, expected torch.nn.Linear")
    return layer


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


def _rms_norm_of(norm: torch.nn.Module, size: int) -> tuple[float, Tensor | None]:
    if not isinstance(norm, torch.nn.RMSNorm):
        raise TypeError(f"GatedMLP: norm is a {type(norm).__name__}, expected torch.nn.RMSNorm")
    if tuple(norm.normalized_shape) != (size,):
        raise ValueError(
            f"GatedMLP: norm is over {tuple(norm.normalized_shape)}, expected ({size},), gate_proj's in_features"
        )
    weight = None if norm.weight is None else norm.weight.detach()
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    return torch.finfo(dtype).eps if norm.eps is None else norm.eps, weight  # as torch's RMSNorm has it


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
