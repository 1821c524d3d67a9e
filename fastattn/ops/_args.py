"""What an operator declares about its arguments; `fastattn.ops.checks` says how to read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

MAX_LEADING_DIMS = 3
MAX_HEAD_DIM = 256  # of attention
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Dtypes:
    cpu: tuple[torch.dtype, ...]
    cuda: tuple[torch.dtype, ...]


FLOAT = Dtypes((torch.bfloat16, torch.float16, torch.float32), (torch.bfloat16, torch.float16))
FLOAT_OR_FP8 = Dtypes((*FLOAT.cpu, FP8), (*FLOAT.cuda, FP8))
KV_CACHE = Dtypes((*FLOAT.cpu, FP8, torch.int8), (*FLOAT.cuda, FP8, torch.int8))
LOGITS = Dtypes(FLOAT.cpu, FLOAT.cpu)
E4M3 = Dtypes((FP8,), (FP8,))
FP32 = Dtypes((torch.float32,), (torch.float32,))
INT8 = Dtypes((torch.int8,), (torch.int8,))
UINT8 = Dtypes((torch.uint8,), (torch.uint8,))
INT32 = Dtypes((torch.int32,), (torch.int32,))
INT64 = Dtypes((torch.int64,), (torch.int64,))


@dataclass(frozen=True)
class TensorArg:
    name: str
    shape: str
    dtype: Dtypes | str
    optional: bool = False
    mutated: bool = False
    grad: bool = False  # it may require grad
    any_strides: bool = False
    dims: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.shape.split()))

    @property
    def like(self) -> str | None:
        return self.dims[1] if self.dims[0] == "like" else None

    @property
    def leading(self) -> bool:
        return self.dims[0] == "..."

    @property
    def may_lack_first(self) -> bool:
        return self.dims[0][0] == "["


@dataclass(frozen=True)
class NonNegative:
    """A finite number ≥ 0."""

    name: str


@dataclass(frozen=True)
class AtLeast:
    """An int ≥ minimum."""

    name: str
    minimum: int


@dataclass(frozen=True)
class Flag:
    """True or False."""

    name: str


Arg = TensorArg | NonNegative | AtLeast | Flag


def split_dim(dim: str) -> tuple[str, int, int]:
    """A dimension as (symbol, factor, addend): N, 2N or B+1; [N] is N."""
    dim = dim.strip("[]")
    symbol, _, addend = dim.partition("+")
    return (symbol[1:], 2, 0) if symbol[0] == "2" else (symbol, 1, int(addend or 0))


def overlaps(t: Tensor) -> bool:
    """Whether two elements may share memory: a dimension steps by less than the ones inside it reach."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= reach:
            return t.numel() > 0
        reach += stride * (size - 1)
    return False


def fail_value(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")


def fail_type(op: str, message: str) -> NoReturn:
    raise TypeError(f"{op}: {message}")
