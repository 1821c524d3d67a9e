"""The kernel for all layers of a decoder, beside fp64 and the kernels one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastattn import ops
from tests.harness.decode_layers import CALLS, SMALL, SMOLLM2, make_call

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def workspace(sizes: tuple[int, int, int, int, int]) -> torch.Tensor:
    return ops.decode_layers_workspace(*sizes, CUDA)


def check(found: torch.Tensor, exact: torch.Tensor, one_by_one: torch.Tensor) -> None:
    """At most twice as far from fp64 as the kernels one by one."""
    error, allowed = (float((t.double() - exact).abs().max()) for t in (found, one_by_one))
    assert error <= 2 * allowed + 1e-6, (error, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", range(len(CALLS)))
def test_it_is_as_exact_as_the_kernels_one_by_one(index: int, dtype: torch.dtype) -> None:
    num_layers, sizes, lengths, options = CALLS[index]
    call = make_call(CUDA, dtype, num_layers, sizes, lengths, seed=index, **options)
    memory = workspace(sizes)
    found, k_cache, v_cache = call.run(memory)
    rows = [row for row, length in enumerate(lengths) if length]
    check(found[rows], call.exact()[rows], call.layer_by_layer()[rows])
    for _ in range(5):  # the workspace goes on counting
        again, k_again, v_again = call.run(memory)
        assert torch.equal(found[rows], again[rows])
        for a, b in zip((*k_cache, *v_cache), (*k_again, *v_again), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    slots = call.rows["slot_mapping"][rows].long()
    for before, after in zip((*call.k_cache, *call.v_cache), (*k_cache, *v_cache), strict=True):
        assert bool(after.flatten(0, 1)[slots].isfinite().all())
        kept = torch.ones(before.shape[0] * before.shape[1], dtype=torch.bool, device=CUDA)
        kept[slots] = False
        assert torch.equal(before.flatten(0, 1)[kept].nan_to_num(7.0), after.flatten(0, 1)[kept].nan_to_num(7.0))


@pytest.mark.parametrize("order", [8, 16])
@pytest.mark.parametrize("index", [i for i, call in enumerate(CALLS) if call[1][4] == 128])
def test_weights_in_4_bits_are_as_exact_as_the_kernels_one_by_one(index: int, order: int) -> None:
    num_layers, sizes, lengths, options = CALLS[index]
    call = (
        make_call(CUDA, torch.bfloat16, num_layers, sizes, lengths, seed=index, **options).in_fp4(order).with_head(72)
    )
    assert call.head is not None
    memory = workspace(sizes)
    residual, k_cache, v_cache = call.run(memory)
    logits = call.head.logits.clone()
    rows = [row for row, length in enumerate(lengths) if length]
    check(residual[rows], call.exact()[rows], call.layer_by_layer()[rows])
    check(logits[rows], call.exact_logits()[rows], call.logits_one_by_one()[rows])
    for _ in range(5):
        again, k_again, v_again = call.run(memory)
        assert torch.equal(residual[rows], again[rows])
        assert torch.equal(logits[rows], call.head.logits[rows])
        for a, b in zip((*k_cache, *v_cache), (*k_again, *v_again), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_weights_in_4_bits_that_the_kernel_does_not_take_are_named() -> None:
    call = make_call(CUDA, torch.float16, 1, SMALL, [5]).in_fp4(16)
    with pytest.raises(TypeError, match=r"decode_layers: residual is torch.float16, expected torch.bfloat16"):
        call.run(workspace(SMALL))
    call = make_call(CUDA, torch.bfloat16, 1, SMOLLM2, [5]).in_fp4(16)
    with pytest.raises(ValueError, match=r"decode_layers: k_cache has D = 64, expected 128 with 4-bit weights"):
        call.run(workspace(SMOLLM2))


def test_a_graph_serves_other_lengths_and_numbers_of_rows_share_a_workspace() -> None:
    memory = workspace(SMOLLM2)
    call = make_call(CUDA, torch.bfloat16, 4, SMOLLM2, [700, 900], seed=1)
    one = make_call(CUDA, torch.bfloat16, 4, SMOLLM2, [50], seed=2)
    residual, lengths = call.residual.clone(), call.rows["seqused_k"]
    expected = {}
    for length in (1, 300, 700):
        lengths[0] = length
        expected[length] = call.run(workspace(SMOLLM2))[0]
    expected_one = one.run(workspace(SMOLLM2))[0]
    graph = torch.cuda.CUDAGraph()
    k_cache, v_cache = ([t.clone() for t in caches] for caches in (call.k_cache, call.v_cache))
    with torch.cuda.graph(graph):
        ops.decode_layers(
            residual, call.weights, k_cache, v_cache, **call.rows, workspace=memory, num_heads=9, softmax_scale=0.125,
            norm_eps=1e-5,
        )  # fmt: skip
    for length in (300, 1, 700, 300):
        lengths[0] = length
        residual.copy_(call.residual)
        graph.replay()
        assert torch.equal(residual, expected[length]), length
        assert torch.equal(one.run(memory)[0], expected_one)


@pytest.mark.parametrize(
    ("sizes", "lengths", "vocab_size"),
    [(SMOLLM2, [200], 49152), (SMOLLM2, [1, 65, 0, 301], 520), (SMALL, [63, 128, 900], 1000), (SMALL, [40], 8)],
)
def test_a_head_makes_logits_of_token_ids(
    sizes: tuple[int, int, int, int, int], lengths: list[int], vocab_size: int
) -> None:
    call = make_call(CUDA, torch.bfloat16, 3, sizes, lengths, seed=3).with_head(vocab_size)
    assert call.head is not None
    memory = workspace(sizes)
    rows = [row for row, length in enumerate(lengths) if length]
    residual, _, _ = call.run(memory)
    logits = call.head.logits.clone()
    check(residual[rows], call.exact()[rows], call.layer_by_layer()[rows])
    check(logits[rows], call.exact_logits()[rows], call.logits_one_by_one()[rows])
    without = dataclasses.replace(call, head=None)
    assert torch.equal(
        without.run(memory)[0][rows], residual[rows]
    )  # shares the workspace, and begins with the same rows
    for _ in range(5):
        assert torch.equal(call.run(memory)[0][rows], residual[rows])
        assert torch.equal(call.head.logits[rows], logits[rows])


def test_ids_that_do_not_exist_are_rows_of_zeros() -> None:
    call = make_call(CUDA, torch.bfloat16, 2, SMOLLM2, [5, 70, 3, 9], seed=4).with_head(64)
    assert call.head is not None
    ids = torch.tensor([64, -5, 7, -1], dtype=torch.int32, device=CUDA)
    drawn = torch.tensor([-1, 3, 2, 1], dtype=torch.int32, device=CUDA)
    other = dataclasses.replace(call, head=dataclasses.replace(call.head, token_ids=ids, drawn=drawn))
    found, _, _ = other.run(workspace(SMOLLM2))
    start = torch.zeros_like(call.residual)
    start[2] = call.head.embedding[7]
    assert torch.equal(found, dataclasses.replace(call, residual=start, head=None).run(workspace(SMOLLM2))[0])


def test_what_the_kernel_does_not_take_is_named_before_it_is_launched() -> None:
    call = make_call(CUDA, torch.bfloat16, 1, SMOLLM2, [5])
    memory = workspace(SMOLLM2)
    with pytest.raises(ValueError, match=r"decode_layers: workspace has 9 elements, expected the \d+ of"):
        call.run(memory[:9])
    pages = make_call(CUDA, torch.bfloat16, 1, SMOLLM2, [5], block_size=24)
    with pytest.raises(ValueError, match=r"decode_layers: k_cache has pages of 24 keys, expected a power of two"):
        pages.run(memory)
    one_further = torch.empty(call.weights.down[0].numel() + 1, dtype=torch.bfloat16, device=CUDA)[1:]
    weights = dataclasses.replace(call.weights, down=[one_further.view_as(call.weights.down[0])])
    with pytest.raises(RuntimeError, match=r"down_weight begins at an address that is not a multiple of 16"):
        dataclasses.replace(call, weights=weights).run(memory)
