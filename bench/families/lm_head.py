"""A language model's head and the draw behind it as one operator, beside a product and a draw from its logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, Family, op_case
from bench.harness.ceilings import Work
from fastattn import ops
from fastattn.reference.lm_head import gumbel_noise

# V × K of Llama 3 8B, Llama 3.2 1B and Qwen2.5 7B.
HEADS = ((128256, 4096), (128256, 2048), (152064, 3584))
ROWS = (1, 16, 64, 128, 256)


def lm_head(context: Context, m: int, vocab: int, k: int, temperature: float) -> Case:
    rng = context.generator(m)
    device = context.device
    x = torch.randn(m, k, generator=rng, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, k, generator=rng, device=device, dtype=torch.bfloat16) * (3 * k**-0.5)
    row = {
        "temperature": torch.full((m,), temperature, device=device),
        "seed": torch.randint(-(2**62), 2**62, (m,), generator=rng, device=device),
        "position": torch.randint(0, 2**40, (m,), generator=rng, device=device),
    }
    limits = (
        torch.zeros(m, dtype=torch.int32, device=device),
        torch.ones(m, device=device),
        torch.zeros(m, device=device),
    )

    def ours() -> Tensor:
        """What the operator is made of elsewhere, but with `sample`'s draw."""
        return ops.sample(ops.linear(x, weight), row["temperature"], *limits, row["seed"], row["position"])

    def torch_only() -> Tensor:
        logits = F.linear(x, weight)
        if temperature == 0:
            return logits.argmax(-1)
        chances = (logits.float() / temperature).softmax(-1)
        return (chances / torch.empty_like(chances).exponential_()).argmax(-1)

    return op_case(
        ops.lm_head_sample,
        {"x": x, "weight": weight, **row},
        _no_formula,
        judge=judge,
        peers={"linear_sample": lambda: ours, "cublas_torch": lambda: torch_only},
        work=Work(num_bytes=2 * (m * k + vocab * k), num_ops=2 * m * vocab * k),
        config=f"x {m} × {k}, weight {vocab} × {k}, bf16, temperature {temperature}",
    )


def _no_formula(c: torch.dtype, **_: Any) -> list[Tensor]:
    raise AssertionError("lm_head is judged by its scores")


def judge(call: dict[str, Any], results: list[Tensor]) -> Checked:
    """Each token's score, from logits of another product, is the best but for a unit in the last place of two logits."""
    tokens, scores = results
    logits = F.linear(call["x"], call["weight"]).float()
    seed, position, temperature = (call[name].cpu() for name in ("seed", "position", "temperature"))
    if float(temperature[0]) > 0:
        noise = gumbel_noise(seed, position, 0, logits.shape[1]) * temperature[:, None]
        exact = logits + noise.to(logits.device)
    else:
        exact = logits
    best = exact.amax(-1)
    chosen = exact.gather(1, tokens.long().clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    allowed = 2 * torch.finfo(torch.bfloat16).eps * logits.abs().amax(-1)
    error = torch.maximum(best - chosen, (scores - best).abs()) / allowed
    if not bool(((error <= 1) & (tokens >= 0)).all()):
        at = int(error.argmax())
        raise WrongResultError(
            f"lm_head_sample: row {at} got {int(tokens[at])}, whose score is {float(chosen[at])}, as {float(scores[at])}; "
            f"the best is {float(best[at])}"
        )
    return Checked(float(error.max()))


FAMILY = Family(
    "lm_head",
    "cuda",
    "lm_head_sample beside linear and sample, and beside cuBLAS and torch",
    tuple(
        CaseSpec(
            f"m{m}_v{vocab}_k{k}_{kind}",
            partial(lm_head, m=m, vocab=vocab, k=k, temperature=temperature),
            quick=m == 64 and k == 4096,
        )
        for kind, temperature in (("greedy", 0.0), ("drawn", 0.8))
        for vocab, k in HEADS
        for m in ROWS
    ),
)
