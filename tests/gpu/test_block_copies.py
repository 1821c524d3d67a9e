"""Block copies with what only a GPU has: pinned memory at the other end, one captured graph for any pairs, and caches whose
offsets pass 2³¹."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import ops

pytestmark = pytest.mark.gpu
BLOCK = (16, 3, 64)


def caches(num_blocks: int, num_caches: int, pinned: bool = False) -> list[Tensor]:
    """Keys and values, and scales of their tokens; pinned ones are zeros."""
    shapes = [(num_blocks, *BLOCK), (num_blocks, *BLOCK[:2])]
    dtypes = [torch.bfloat16, torch.float32]
    if pinned:
        kinds = [torch.zeros(shapes[i % 2], dtype=dtypes[i % 2], pin_memory=True) for i in range(num_caches)]
    else:
        kinds = [torch.randn(shapes[i % 2], device="cuda").to(dtypes[i % 2]) for i in range(num_caches)]
    return kinds


def pairs(*values: tuple[int, int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("num_caches", [2, 450])
def test_to_the_host_and_back(num_caches: int) -> None:
    """450 are more than a launch takes."""
    device, host = caches(9, num_caches), caches(4, num_caches, pinned=True)
    before = [cache.cpu() for cache in device]
    ops.swap_blocks(device, host, pairs((7, 0), (2, 3), (-1, 1)))
    torch.cuda.synchronize()
    for there, here in zip(host, before, strict=True):
        assert torch.equal(there[[0, 3]], here[[7, 2]]) and not there[1:3].any()
    ops.swap_blocks(host, device, pairs((3, 1), (0, 8)))
    for there, here in zip(device, before, strict=True):
        here[[1, 8]] = here[[2, 7]]
        assert torch.equal(there.cpu(), here)


def test_memory_that_is_not_pinned_is_refused() -> None:
    device, host = caches(4, 2), [cache.cpu() for cache in caches(4, 2)]
    with pytest.raises(ValueError, match=r"destinations\[0\] is on cpu, expected cuda:0 or pinned memory"):
        ops.swap_blocks(device, host, pairs((0, 0)))
    with pytest.raises(RuntimeError, match=r"destinations\[0\] is not on a CUDA device nor in pinned memory"):
        torch.ops.fastattn.swap_blocks(device, host, pairs((0, 0)))


def test_one_graph_for_any_pairs() -> None:
    device = caches(12, 6)
    mapping = torch.full((3, 2), -1, dtype=torch.int32, device="cuda")
    counts = torch.zeros(3, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_blocks(device, mapping, counts)
    for drawn, sizes in (([(0, 1)], [16]), ([(5, 6), (5, 7), (2, 3)], [1, 15, 0]), ([], [])):
        before = [cache.clone() for cache in device]
        mapping.fill_(-1)
        for i, (pair, size) in enumerate(zip(drawn, sizes, strict=True)):
            mapping[i] = pairs(pair)[0]
            counts[i] = size
        graph.replay()
        for now, then in zip(device, before, strict=True):
            for (source, target), size in zip(drawn, sizes, strict=True):
                then[target, :size] = then[source, :size]
            assert torch.equal(now, then)


def test_offsets_beyond_32_bits() -> None:
    cache = torch.empty(140_000, 16, 8, 128, dtype=torch.uint8, device="cuda")  # 2.3 GB
    cache[139_999].fill_(7)
    cache[3].fill_(1)
    ops.copy_blocks([cache], pairs((139_999, 0), (3, 139_998)))
    assert bool((cache[0] == 7).all()) and bool((cache[139_998] == 1).all())
