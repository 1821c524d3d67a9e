"""When a result of flash-attn's functions is right: the rules that flash-attn's own tests have, against attention written
out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def close(
    what: str, found: Tensor, exact: Tensor, plain: Tensor | None, factor: float = 2.0, noise: float = 0.0
) -> None:
    """At most twice the error of a plain program in the same dtype, as flash-attn asks of itself, and `noise`."""
    assert found.shape == exact.shape, f"{what}: {tuple(found.shape)}, expected {tuple(exact.shape)}"
    assert not found.isnan().any(), f"{what} has NaN"
    error = (found.float() - exact.float()).abs().max().item() if found.numel() else 0.0
    scale = max(1.0, exact.float().abs().max().item()) if exact.numel() else 1.0
    ulp = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[found.dtype]
    allowed = ulp * scale
    if plain is not None:
        allowed = max(allowed, factor * (plain.float() - exact.float()).abs().max().item())
    allowed += noise
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def same_lse(found: Tensor, exact: Tensor) -> None:
    exact = exact.masked_fill(exact == -torch.inf, torch.inf)
    assert found.dtype == torch.float32 and found.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(found == torch.inf, ~finite), "LSE: +inf exactly where a row sees no key"
    torch.testing.assert_close(found[finite], exact[finite], atol=2e-4, rtol=1e-5)


def errors_from_rounded_out(
    out: Tensor, exact: Tensor, exact_lse: Tensor, leaves: list[Tensor], upstream: Tensor
) -> list[float]:
    """How much of each gradient's error comes from `out` as it was kept, in its own dtype: the sum of dout * out of a row is
    taken from there. An error of it acts like a gradient of -lse."""
    error = (upstream.float() * (out.float() - exact)).detach().sum(-1).transpose(-1, -2)
    finite = exact_lse.isfinite()
    gradients = torch.autograd.grad(exact_lse[finite], leaves, -error[finite], materialize_grads=True)
    return [gradient.abs().max().item() if gradient.numel() else 0.0 for gradient in gradients]


def compare(
    call: Callable[..., Any], inputs: list[Tensor], reference: Callable[..., Any], options: dict[str, Any]
) -> None:
    """Output, LSE and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse, empty = call(*leaves)
    assert empty.numel() == 0 and out.dtype == inputs[0].dtype
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, upstream)
    wide = [x.detach().float().requires_grad_() for x in inputs]  # from these nothing is rounded, the output included
    exact, exact_lse = reference(*wide, upcast=True, **options)
    exact_grads = torch.autograd.grad(exact, wide, upstream.float(), retain_graph=True)
    narrow = [x.detach().clone().requires_grad_() for x in inputs]
    plain, _ = reference(*narrow, upcast=False, **options)
    plain_grads = torch.autograd.grad(plain, narrow, upstream)
    close("out", out, exact, plain)
    same_lse(lse, exact_lse)
    noise = errors_from_rounded_out(out, exact, exact_lse, wide, upstream)
    for index, (a, b, c, n) in enumerate(zip(grads, exact_grads, plain_grads, noise, strict=True)):
        close(f"gradient {index}", a, b, c, 3.0, n)
