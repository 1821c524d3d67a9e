"""Tiny INT4 weights in the layouts of GPTQ's and AWQ's tools, packed word by word as those publish them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _words(codes: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours along ``dim`` to a word, nibble i being neighbour order[i]."""
    eights = codes.long().movedim(dim, 0).unflatten(0, (-1, 8))
    words = sum(eights[:, neighbour] << 4 * nibble for nibble, neighbour in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.int32).movedim(0, dim).contiguous()


@dataclass(frozen=True)
class ToolForm:
    """method: "gptq" or "awq". version: GPTQ's checkpoint_format. ordered: desc_act."""

    method: str
    group_size: int = 32
    symmetric: bool = True
    version: str = "gptq"
    ordered: bool = False
    ignore: tuple[str, ...] = ("lm_head",)

    def quantization_config(self) -> dict[str, Any]:
        base = {"quant_method": self.method, "bits": 4, "group_size": self.group_size}
        if self.method == "awq":
            return base | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
        own = {"desc_act": self.ordered, "sym": self.symmetric, "checkpoint_format": self.version, "lm_head": False}
        return base | own

    def compress(self, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows, columns = weight.shape
        draw = torch.Generator().manual_seed(columns)
        size = columns if self.group_size == -1 else self.group_size
        group_of = torch.arange(columns) // size
        if self.ordered:
            group_of = group_of[torch.randperm(columns, generator=draw)]
        num_groups = columns // size
        scale = (weight.abs().amax() / 7 * (0.5 + torch.rand(rows, num_groups, generator=draw))).half().float()
        zero = torch.full((rows, num_groups), 8)
        if not self.symmetric:
            zero = torch.randint(0, 16, (rows, num_groups), generator=draw)
        step, middle = scale[:, group_of], zero[:, group_of]
        codes = (weight / step + middle).round().clamp(0, 15).long()
        dense = (codes - middle) * step
        scales = scale.t().contiguous().half()
        if self.method == "awq":
            stored = {"qweight": _words(codes.t(), 1, _AWQ_ORDER), "qzeros": _words(zero.t(), 1, _AWQ_ORDER)}
            return stored | {"scales": scales}, dense
        stored_zero = zero if self.version == "gptq_v2" else zero - 1 & 15
        stored = {"qweight": _words(codes.t(), 0), "qzeros": _words(stored_zero.t(), 1), "scales": scales}
        return stored | {"g_idx": group_of.to(torch.int32)}, dense


TOOL_FORMS = {
    "gptq": ToolForm("gptq"),
    "gptq rows": ToolForm("gptq", -1),
    "gptq zero points": ToolForm("gptq", symmetric=False),
    "gptq zero points v2": ToolForm("gptq", symmetric=False, version="gptq_v2"),
    "gptq ordered": ToolForm("gptq", symmetric=False, ordered=True),
    "awq": ToolForm("awq", symmetric=False),
}
