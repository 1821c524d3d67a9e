"""The portable attention kernels (sm_80), forced, forward and backward, beside torch's FlashAttention-2 on the same GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

from bench.families import flash_bwd, flash_fwd
from bench.harness.case import Case, CaseSpec, Context, Family

DIRECTIONS: dict[str, Callable[..., Case]] = {"fwd": flash_fwd.attention, "bwd": flash_bwd.of_sequences}
TARGET = 0.9  # "within 10 % of FA2's speed"


def portable(
    context: Context, direction: str, dim: int, lengths: list[int], causal: bool, heads: int, kv_heads: int
) -> Case:
    case = DIRECTIONS[direction](context, dim, lengths, causal, heads, kv_heads, kernel="sm80")
    return replace(case, peers={"fa2": case.peers["fa2"]}, target=TARGET)


def _cases() -> Iterator[CaseSpec]:
    for direction in DIRECTIONS:
        for dim, length, causal in product((64, 96, 128, 256), (512, 8192), (False, True)):
            lengths = [length] * (flash_fwd.TOKENS // length)
            heads = flash_fwd.HEADS[dim]
            build = partial(
                portable, direction=direction, dim=dim, lengths=lengths, causal=causal, heads=heads, kv_heads=heads
            )
            name = f"{direction}_d{dim}_s{length}_{'causal' if causal else 'full'}_bf16"
            yield CaseSpec(name, build, quick=(dim, length) == (128, 512))
        for name, lengths in (("gqa32to8_s2048", [2048] * 8), ("varlen1000", flash_fwd.lognormal(16, 8192, 1000.0, 1))):
            build = partial(portable, direction=direction, dim=128, lengths=lengths, causal=True, heads=32, kv_heads=8)
            yield CaseSpec(f"{direction}_d128_{name}_causal_bf16", build)


FAMILY = Family("flash_sm80", "cuda", "the portable attention kernels beside FlashAttention-2", tuple(_cases()))
