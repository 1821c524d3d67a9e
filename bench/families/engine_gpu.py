"""The whole engine on a GPU in bf16 with a small model, beside transformers' `generate` where that can be imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.families import smollm2
from bench.families.smollm2 import Request
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, Family
from bench.harness.ceilings import Work
from bench.harness.peers import PeerAbsentError

_CHECKED = 4  # requests whose tokens are held against transformers' logits


def generation(context: Context, batch: int, prompt: int, new: int) -> Case:
    """`batch` requests at once; new = 1: the time until each has its first token."""
    dtype = "bfloat16" if context.device.type == "cuda" else "float32"
    llm = smollm2.our_llm(context, dtype=dtype, gpu_memory_utilization=0.3)
    # not all the same length: requests of one length would start and end in step
    listed: list[Request] = smollm2.requests(context, llm.tokenizer, [(prompt - i % 7, new) for i in range(batch)])
    ours = smollm2.our_generate(llm, listed)

    def model(dtype: torch.dtype) -> Any:
        return context.once(f"hf {dtype}", lambda: smollm2.hf_from_ours(context.device, dtype))

    def check() -> Checked:
        tokens = ours()
        if [len(t) for t in tokens] != [n for _, n in listed]:
            raise WrongResultError(f"lengths {[len(t) for t in tokens]}, expected {[n for _, n in listed]}")
        try:
            exact, plain = model(torch.float32), model(torch.bfloat16)
        except PeerAbsentError:
            alone = smollm2.our_generate(llm, listed[:1])
            if alone() != alone():
                raise WrongResultError("two runs of one request gave different tokens") from None
            return Checked(0.0)
        return Checked(smollm2.check_near(exact, plain, listed[:_CHECKED], tokens[:_CHECKED]))

    def peer() -> Callable[[], list[list[int]]]:
        return smollm2.hf_generate(model(torch.bfloat16), listed, together=True)

    return Case(
        ours,
        check,
        {"hf": peer},
        Work(items=batch * new, unit="tok"),
        f"SmolLM2-135M {dtype}, {batch} request(s) of about {prompt} prompt and {new} new tokens, greedy",
    )


def _spec(batch: int, prompt: int, new: int, quick: bool = False) -> CaseSpec:
    kind = f"b{batch}" if new > 1 else f"ttft_b{batch}"
    return CaseSpec(f"smollm2_{kind}", lambda c: generation(c, batch, prompt, new), quick)


FAMILY = Family(
    "engine_gpu",
    "cuda",
    "our engine on a GPU with SmolLM2, beside transformers",
    (
        _spec(1, 128, 128, quick=True),
        _spec(8, 128, 128),
        _spec(64, 128, 128),
        _spec(1, 512, 1, quick=True),
        _spec(64, 128, 1),
    ),
    timer="wall",
    rounds=2,
)
