"""What products write instead of sums, at models' sizes: tokens of a head, sums with a residual and their squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import ops
from fastattn.reference.lm_head import gumbel_noise

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def row_args(rows: int, temperature: float) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(rows)
    return {
        "temperature": torch.full((rows,), temperature, device=CUDA),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=gen).to(CUDA),
        "position": torch.randint(0, 2**40, (rows,), generator=gen).to(CUDA),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "k"), [(128256, 4096), (49152, 576), (2056, 1024)])
def test_a_head_gives_what_linear_and_sample_give(vocab: int, k: int, dtype: torch.dtype) -> None:
    """Greedy bit by bit, since sums are `linear`'s; drawn, what its logits and the noise say, up to fp32's rounding."""
    torch.manual_seed(0)
    weight = torch.randn(vocab, k, device=CUDA, dtype=dtype) * (3 * k**-0.5)
    for rows in (1, 2, 16, 32, 33, 64, 128, 129, 256, 300):
        x = torch.randn(rows, k, device=CUDA, dtype=dtype)
        logits = ops.linear(x, weight)
        limits = (torch.zeros(rows, dtype=torch.int32, device=CUDA), torch.ones(rows, device=CUDA))
        args = row_args(rows, 0.0)
        tokens, scores = ops.lm_head_sample(x, weight, **args)
        greedy = ops.sample(
            logits, args["temperature"], *limits, torch.zeros(rows, device=CUDA), args["seed"], args["position"]
        )
        assert torch.equal(tokens, greedy), rows
        assert torch.equal(scores, logits.amax(1).float()), rows
        if rows > 33:
            continue
        args = row_args(rows, 0.8)
        tokens, scores = ops.lm_head_sample(x, weight, **args)
        noise = gumbel_noise(args["seed"].cpu(), args["position"].cpu(), 0, vocab).to(CUDA)
        exact = logits.float() + 0.8 * noise
        assert bool((exact.gather(1, tokens[:, None].long())[:, 0] >= exact.amax(1) - 2e-5).all()), rows
        torch.testing.assert_close(scores, exact.amax(1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336), (6144, 4096), (576, 1536)])
def test_a_residual_is_added_before_the_sum_is_rounded(n: int, k: int, dtype: torch.dtype) -> None:
    """Of integers and quarters, whose sums are exact, the same bits as a product in fp64, also with gaps between rows."""
    gen = torch.Generator().manual_seed(k)
    weight = torch.randint(-1, 2, (n, k), generator=gen).to(CUDA, dtype)
    for rows in (1, 2, 16, 33, 64, 100, 128, 200, 256, 257, 384, 512, 768, 1030, 4096):
        x = torch.randint(-2, 3, (rows, k), generator=gen).to(CUDA, dtype)
        residual = (torch.randint(-100, 101, (rows, n + 8), generator=gen).to(CUDA, torch.float32) / 4).to(dtype)[:, :n]
        expected = (x.double() @ weight.double().t() + residual.double()).to(dtype)
        out, sums = ops.linear(x, weight, residual=residual, with_sums=True)
        assert torch.equal(out, expected) and torch.equal(ops.linear(x, weight, residual=residual), expected), rows
        exact = out.double().square().view(rows, n // 32, 32).sum(-1)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=0)
        assert torch.equal(sums, ops.linear(x, weight, residual=residual, with_sums=True)[1]), rows
