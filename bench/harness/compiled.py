"""torch.compile as a peer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness.case import Context, PeerBuilder
from bench.harness.peers import PeerAbsentError, skip

# Seconds a run may spend on compiling torch.compile's side: a lent GPU waits meanwhile.
COMPILE_SECONDS = 40.0


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly these shapes. Earlier compilations are dropped, so that no limit on recompiling is met."""
    if not torch.cuda.is_available():
        raise PeerAbsentError("torch.compile is measured on a GPU only")
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiled_peer(context: Context, function: Callable[..., Any], *arguments: Tensor) -> PeerBuilder:
    """Of `function` on these arguments, while there is time left to compile it."""
    if context.quick:
        return skip("torch.compile takes seconds a shape and is left out of --quick")

    def build() -> Callable[[], Any]:
        spent = context.shared.get("compile seconds", 0.0)
        if spent > COMPILE_SECONDS:
            raise PeerAbsentError(f"torch.compile has had its {COMPILE_SECONDS:g} s of this run")
        start = time.perf_counter()
        call = compiled(function)
        call(*(t.clone() for t in arguments))  # compiles; on copies, because some functions change their arguments
        context.shared["compile seconds"] = spent + time.perf_counter() - start
        return lambda: call(*arguments)

    return build
