"""The whole engine on a CPU in fp32 beside transformers' `generate`: same process, same threads, in turns."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.families import smollm2
from bench.families.smollm2 import Request
from bench.harness.case import Case, CaseSpec, Checked, Context, Family
from bench.harness.ceilings import Work
from bench.harness.peers import require

# prompt tokens, new tokens
ONE = ((64, 64),)
MIXED = ((16, 64), (180, 24), (40, 96), (96, 40), (24, 80), (130, 16), (64, 48), (12, 72))


def generation(context: Context, lengths: tuple[tuple[int, int], ...], target: float) -> Case:
    llm = smollm2.our_llm(context, dtype="float32")
    listed: list[Request] = smollm2.requests(context, llm.tokenizer, lengths)
    ours = smollm2.our_generate(llm, listed)

    def model() -> torch.nn.Module:
        found: torch.nn.Module = context.once("hf", smollm2.hf_from_gguf)
        return found

    def check() -> Checked:
        smollm2.check_equal(ours(), smollm2.hf_generate(model(), listed, together=False)())
        return Checked(0.0)

    def peer(together: bool) -> Callable[[], Callable[[], list[list[int]]]]:
        return lambda: smollm2.hf_generate(model(), listed, together)

    several = len(lengths) > 1
    return Case(
        ours,
        check,
        {"hf_batch": peer(True), "hf_one_by_one": peer(False)} if several else {"hf": peer(True)},
        Work(items=sum(new for _, new in lengths), unit="tok"),
        f"SmolLM2-135M fp32, {len(lengths)} request(s) of (prompt, new) {', '.join(f'({p}, {n})' for p, n in lengths)}, greedy",
        target,
    )


def loading(context: Context, target: float) -> Case:
    """Ours: from the name to an engine that can run, tokenizer and KV cache included. Theirs: the model alone."""

    def ours() -> int:
        from fastattn import LLM

        llm = LLM(smollm2.MODEL, device="cpu", dtype="float32", quiet=True)
        return int(llm.model_config.num_layers)

    def check() -> Checked:
        ours()
        return Checked(0.0)

    def peer() -> Callable[[], None]:
        require("transformers")
        require("gguf")

        def call() -> None:
            smollm2.hf_from_gguf()

        return call

    return Case(
        ours, check, {"hf_gguf": peer}, Work(), "SmolLM2-135M GGUF (Q4_1) to fp32, file in the page cache", target
    )


FAMILY = Family(
    "engine_cpu",
    "cpu",
    "our engine on a CPU beside transformers",
    (
        CaseSpec("smollm2_b1", lambda c: generation(c, ONE, 1.0), quick=True),
        CaseSpec("smollm2_mixed8", lambda c: generation(c, MIXED, 2.0)),
        CaseSpec("smollm2_load", lambda c: loading(c, 5.0)),
    ),
    timer="wall",
    rounds=3,
)
