"""A thousand runs of each form of attention have the same bits; on the CPU, of two; and a form is what its name says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn import _runtime
from tests.harness.generators import Gen
from tests.harness.repeats import BACKWARD, FORWARD, FORWARD_FP8, PAGED, Form, differing_runs

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
KERNELS = ["sm80", "sm90"] if HOPPER else ["sm80"]
NUM_SMS = 132


def places() -> list[Any]:
    """A device and a kernel."""
    return [("cpu", "auto"), *(pytest.param("cuda", kernel, marks=pytest.mark.gpu) for kernel in KERNELS)]


def devices() -> list[Any]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def check(form: Form, device: str) -> None:
    runs = 1000 if device == "cuda" else 1
    assert (differ := differing_runs(form, runs)) == 0, f"{differ} of {runs} runs have other bits"


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize(("device", "kernel"), places())
def test_forward(name: str, device: str, kernel: str) -> None:
    form = FORWARD[name](Gen(device, seed=1))
    check(Form(form.op, form.call | {"kernel": kernel}), device)


@pytest.mark.parametrize("name", FORWARD_FP8)
@pytest.mark.parametrize("device", devices())
def test_forward_of_fp8(name: str, device: str) -> None:
    if device == "cuda" and not HOPPER:
        pytest.skip("fp8 is for GPUs of compute capability 9.0")
    check(FORWARD_FP8[name](Gen(device, seed=2)), device)


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize(("device", "kernel"), places())
def test_deterministic_backward(name: str, device: str, kernel: str) -> None:
    check(BACKWARD[name](Gen(device, seed=3), kernel), device)


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("device", devices())
def test_pages(name: str, device: str) -> None:
    check(PAGED[name](Gen(device, seed=4)), device)


def decode_config(name: str) -> dict[str, int]:
    call = PAGED[name](Gen()).call
    (_, heads, dim), (_, page, kv_heads, _) = call["q"].shape, call["k_cache"].shape
    num_seqs, max_blocks = call["block_table"].shape
    is_8bit, invariant = call["k_cache"].dtype.itemsize == 1, call.get("batch_invariant", False)
    return _runtime.paged_decode_config(
        num_seqs, heads, kv_heads, dim, call["max_seqlen_q"], max_blocks * page, NUM_SMS, True, False, is_8bit,
        invariant, "tree_mask" in call,
    )  # fmt: skip


def forward_config(name: str) -> dict[str, int]:
    call = FORWARD[name](Gen()).call
    batch, rows, heads, dim = call["q"].shape
    _, keys, kv_heads, v_dim = call["v"].shape
    causal = call.get("causal", False)
    return _runtime.flash_fwd_sm90_config(batch, heads, kv_heads, dim, v_dim, rows, keys, causal, NUM_SMS)


CLAIMS: list[tuple[Callable[[str], dict[str, int]], str, Callable[[dict[str, int]], bool]]] = [
    *(
        (decode_config, name, lambda c: c["cluster_size"] > 1)
        for name in PAGED
        if name.startswith(("few keys", "clusters"))
    ),
    *(
        (decode_config, name, lambda c: c["cluster_size"] == 1 and c["num_parts"] > 1)
        for name in PAGED
        if name.startswith("split keys")
    ),
    (decode_config, "few keys", lambda c: c["rows_of_slot"] <= 8),  # of the kernel for few keys
    (decode_config, "split keys, batch-invariant", lambda c: c["slots_of_area"] > 1),
    (forward_config, "split keys", lambda c: c["num_splits"] > 1),
    (forward_config, "packed groups", lambda c: c["packs"]),
    (forward_config, "head dim 64", lambda c: c["num_splits"] == 1 and not c["packs"]),
]


@pytest.mark.parametrize(
    ("config", "name", "claim"), CLAIMS, ids=[f"{config.__name__}-{name}" for config, name, _ in CLAIMS]
)
def test_a_form_goes_where_its_name_says(
    config: Callable[[str], dict[str, int]], name: str, claim: Callable[[dict[str, int]], bool]
) -> None:
    """On a GPU of 132 SMs: by the sizes that choose clusters, splits and packed groups."""
    found = config(name)
    assert claim(found), found
