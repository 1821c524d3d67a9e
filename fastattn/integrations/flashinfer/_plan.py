"""What the batch wrappers have in common, and the options that a plan keeps for its calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations._common import not_implemented
from fastattn.integrations.flashinfer._common import (
    FP8,
    DType,
    check_encoding,
    check_layout,
    dtype_of,
    refuse,
    softcap_of,
    window_of,
)


@dataclass(frozen=True)
class Plan:
    """What a plan says of every call until the next one."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int | None
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    causal: bool
    window_left: int
    softcap: float
    sm_scale: float | None
    tree_mask: Tensor | None = None  # (T), of pages: then causal does not count

    @staticmethod
    def make(
        op: str,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None,
        page_size: int | None,
        q_data_type: DType,
        kv_data_type: DType | None,
        o_data_type: DType | None,
        causal: bool,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        fixed_split_size: int | None,
        disable_split_kv: bool,
    ) -> Plan:
        check_encoding(op, pos_encoding_mode)
        window_of(op, window_left)
        # Both promise that a row does not depend on its batch, which our kernels do not.
        refuse(op, fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv)
        q_dtype = dtype_of(op, "q_data_type", q_data_type)
        kv_dtype = q_dtype if kv_data_type is None else dtype_of(op, "kv_data_type", kv_data_type)
        if kv_dtype not in (q_dtype, FP8 if page_size is not None else q_dtype):
            also = f", or {FP8}" if page_size is not None else ""
            not_implemented(op, f"kv_data_type is {kv_data_type}, expected q_data_type, {q_dtype}{also}")
        if o_data_type is not None and dtype_of(op, "o_data_type", o_data_type) != q_dtype:
            not_implemented(op, f"o_data_type is {o_data_type}, expected q_data_type, {q_dtype}")
        if page_size is not None and page_size < 1:
            raise ValueError(f"{op}: page_size is {page_size}, expected an int ≥ 1")
        return Plan(
            num_qo_heads, num_kv_heads, head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo, page_size, q_dtype,
            kv_dtype, causal, window_left, softcap_of(op, logits_soft_cap), sm_scale,
        )  # fmt: skip

    def check(self, op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        """That a call's tensors, k and v with tokens before heads, are those that were planned for."""
        heads, dim, dim_v = self.num_kv_heads, self.head_dim_qk, self.head_dim_vo
        planned = (
            ("q", q, (self.num_qo_heads, dim), self.q_dtype),
            ("k", k, (heads, dim), self.kv_dtype),
            ("v", v, (heads, dim_v), self.kv_dtype),
        )
        for name, t, shape, dtype in planned:
            if t.shape[-2:] != shape:
                raise ValueError(
                    f"{op}: {name} has shape {tuple(t.shape)}, expected heads and head dim {shape}, as planned"
                )
            if t.dtype != dtype:
                option = "q_data_type" if name == "q" or self.kv_dtype == self.q_dtype else "kv_data_type"
                raise ValueError(
                    f"{op}: {name} is {t.dtype}, expected {dtype}, as planned: give plan {option}={t.dtype}"
                )
        if self.page_size is not None and k.shape[1] != self.page_size:
            raise ValueError(
                f"{op}: paged_kv_cache has pages of {k.shape[1]} tokens, expected page_size {self.page_size}, as planned"
            )

    def with_options(self, op: str, **options: bool | float | None) -> Plan:
        """What the old `forward` says in place of the plan."""
        if "logits_soft_cap" in options:
            options["softcap"] = softcap_of(op, options.pop("logits_soft_cap"))
        return replace(self, **options)  # type: ignore[arg-type]


class Wrapper:
    """What all wrappers have: a device, a layout, the last plan."""

    _name = ""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str, use_cuda_graph: bool) -> None:
        check_layout(self._op("__init__"), kv_layout)
        self.device = float_workspace_buffer.device
        self._kv_layout = kv_layout
        self._use_cuda_graph = use_cuda_graph
        self._planned: Plan | None = None

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether plans go into fixed buffers, so that a captured graph serves later ones."""
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None = None
    ) -> None:
        """Nothing: the kernels take their workspace from torch."""

    def end_forward(self) -> None:
        """Nothing, as in FlashInfer."""

    def run(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        raise NotImplementedError

    def run_return_lse(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`run` with return_lse."""
        out, lse = self.run(*args, **(kwargs | {"return_lse": True}))
        return out, lse

    def _op(self, method: str) -> str:
        return f"flashinfer.{self._name}.{method}"

    def _plan_of(self, op: str) -> Plan:
        if self._planned is None:
            raise RuntimeError(f"{op}: there is no plan yet, expected a call of plan before it")
        return self._planned

    def _fixed(self, op: str, **buffers: Tensor | None) -> list[Tensor]:
        """The buffers of graph mode, all of which the caller brings."""
        for name, buffer in buffers.items():
            if buffer is None:
                raise ValueError(f"{op}: {name} is None, expected an int32 tensor, as use_cuda_graph is True")
        return [buffer for buffer in buffers.values() if buffer is not None]

    def _int32(self, t: Tensor) -> Tensor:
        return t.to(self.device, torch.int32)
