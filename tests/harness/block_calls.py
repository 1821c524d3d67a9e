"""Calls of the operators that copy KV blocks. Their lists of caches are spelled out, caches[0], caches[1], …, so that each
tensor of them is an argument of its own, as for all other operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from tests.harness.compare import bits
from tests.harness.generators import Gen
from tests.harness.opspec import Bad, Call, fresh

# block size, KV heads, head dim, pairs
SHAPES = ((4, 2, 16, 3), (16, 3, 64, 5), (1, 3, 24, 2), (8, 1, 7, 4), (3, 2, 8, 0), (32, 8, 128, 3))


def _listed(op: Callable[..., None]) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        lists: dict[str, Any] = {}
        for name, value in arguments.items():
            base, bracket, _ = name.partition("[")
            if bracket:
                lists.setdefault(base, []).append(value)
            else:
                lists[base] = value
        op(**lists)

    return call


copy_blocks, swap_blocks = _listed(ops.copy_blocks), _listed(ops.swap_blocks)
COPIED = tuple(f"caches[{i}]" for i in range(4))
SWAPPED = tuple(f"destinations[{i}]" for i in range(4))


def _caches(gen: Gen, name: str, num_blocks: int, size: int, heads: int, dim: int, dtype: torch.dtype) -> Call:
    """Keys and values, and those of a cache of 8 bits with its scales; NaN here and there."""
    keys = gen.randn(num_blocks, size, heads, dim, dtype=dtype)
    keys[0] = math.nan
    numbers = gen.ints(-128, 128, num_blocks, size, heads, dim, dtype=torch.int8)
    tensors = (keys, gen.randn(num_blocks, size, heads, dim, dtype=dtype), numbers, gen.rand(num_blocks, size, heads))
    return {f"{name}[{i}]": t for i, t in enumerate(tensors)}


def _pairs(gen: Gen, sources: list[int], destinations: list[int], num_pairs: int) -> Tensor:
    pairs = list(zip(sources, destinations, strict=False))[:num_pairs]
    return gen.tensor(pairs).view(num_pairs, 2)


def copy_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for size, heads, dim, num_pairs in SHAPES:
        num_blocks = 2 * num_pairs + 2
        order = gen.permutation(num_blocks)
        # A block may be copied to several.
        sources = [order[i // 2] for i in range(num_pairs)]
        mapping = _pairs(gen, sources, order[num_pairs:], num_pairs)
        call = {"block_mapping": mapping, **_caches(gen, "caches", num_blocks, size, heads, dim, dtype)}
        counts = gen.ints(0, size + 1, num_pairs)
        yield f"{(size, heads, dim, num_pairs)}", fresh(call) | {"num_tokens": counts}
        yield f"{(size, heads, dim, num_pairs)} whole", call | {"num_tokens": None}
    padding = gen.tensor([[-1, 0], [1, 2], [-1, -1], [3, -1]])
    yield "padded", fresh(call) | {"block_mapping": padding, "num_tokens": None}


def swap_calls(gen: Gen, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    for size, heads, dim, num_pairs in SHAPES:
        there, here = num_pairs + 1, num_pairs + 3
        mapping = _pairs(gen, gen.permutation(there), gen.permutation(here), num_pairs)
        sources = _caches(gen, "sources", there, size, heads, dim, dtype)
        destinations = _caches(gen, "destinations", here, size, heads, dim, dtype)
        yield f"{(size, heads, dim, num_pairs)}", {"block_mapping": mapping, **sources, **destinations}


def verify_copies(call: Call, results: list[Tensor]) -> None:
    """Every slot has the bits of the slot that it comes from, which a table says."""
    mapping, counts = call["block_mapping"].tolist(), call.get("num_tokens")
    for i, result in enumerate(results):
        before = call[f"caches[{i}]"] if "caches[0]" in call else call[f"destinations[{i}]"]
        source = call[f"caches[{i}]"] if "caches[0]" in call else call[f"sources[{i}]"]
        size = before.shape[1]
        slots = torch.cat([source.flatten(0, 1), before.flatten(0, 1)])
        origin = torch.arange(before.shape[0] * size) + source.shape[0] * size
        for pair, (here, there) in enumerate(mapping):
            for token in range(size if counts is None else int(counts[pair])):
                if min(here, there) >= 0:
                    origin[there * size + token] = here * size + token
        assert torch.equal(bits(result), bits(slots[origin])), f"cache {i}"


def _bad_lists(name: str, base: Call) -> Bad:
    for index in range(4):
        item, t = f"{name}[{index}]", base[f"{name}[{index}]"]
        for value in ([1.0], (), 3, "x", None, object()):
            yield f"{item} is {type(value).__name__}", {item: value}, TypeError, (item, type(value).__name__)
        yield f"{item} flat", {item: t.flatten()}, ValueError, (item, "1 dimensions", "num_blocks")
        yield f"{item} 5 dimensions", {item: t.view(*[1] * (5 - t.dim()), *t.shape)}, ValueError, (item, "5 dim")
        yield f"{item} meta", {item: t.to("meta")}, ValueError, (item, "meta", "expected")
        yield f"{item} sparse", {item: t.to_sparse()}, ValueError, (item, "sparse", "expected")
        yield f"{item} stepped", {item: torch.stack([t, t], -1)[..., 0]}, ValueError, (item, "contiguous")
        if index > 0:
            for dim in (0, 1):
                grown = torch.cat([t, t.narrow(dim, 0, 1)], dim)
                yield f"{item} grown", {item: grown}, ValueError, (item, "shape", "expected")
        if t.is_floating_point():
            yield f"{item} grad", {item: t.clone().requires_grad_()}, ValueError, (item, "requires grad")
        if name != "sources":
            shared = t[:1].expand(t.shape)
            yield f"{item} shares memory", {item: shared}, ValueError, (item, "overlap")


def _bad_mapping(base: Call, num_blocks: tuple[int, int]) -> Bad:
    """num_blocks: of what is copied, and of what it is copied to."""
    mapping = base["block_mapping"]
    yield "three columns", {"block_mapping": mapping.repeat(1, 2)[:, :3]}, ValueError, ("(3, 3)", "(pairs, 2)")
    yield "one column", {"block_mapping": mapping[:, :1]}, ValueError, ("(3, 1)", "(pairs, 2)")
    if mapping.is_cuda:
        return
    for column, blocks in enumerate(num_blocks):
        for block in (-2, blocks, 2**31 - 1):
            wrong = mapping.clone()
            wrong[1, column] = block
            says = (f"block_mapping[1, {column}] is {block}", f"{blocks - 1}")
            yield f"block {block}", {"block_mapping": wrong}, ValueError, says
    twice = mapping.clone()
    twice[1, 1] = twice[0, 1]
    yield "written twice", {"block_mapping": twice}, ValueError, (f"block {int(twice[0, 1])}", "two pairs")


def bad_copies(gen: Gen, base: Call) -> Bad:
    yield from _bad_lists("caches", base)
    mapping = base["block_mapping"]
    yield from _bad_mapping(base, (8, 8))
    if mapping.is_cuda:
        return
    onto_itself, chained = mapping.clone(), mapping.clone()
    onto_itself[0, 1], chained[0, 1] = onto_itself[0, 0], chained[2, 0]
    yield "onto itself", {"block_mapping": onto_itself}, ValueError, ("block_mapping writes", "copied from")
    yield "chained", {"block_mapping": chained}, ValueError, ("block_mapping writes", "copied from")
    for count in (-1, 5):
        counts = gen.tensor([1, 2, count])
        yield f"{count} tokens", {"num_tokens": counts}, ValueError, (f"num_tokens[2] is {count}", "≤ 4", "block_size")


def bad_swaps(gen: Gen, base: Call) -> Bad:
    yield from _bad_lists("sources", base)
    yield from _bad_lists("destinations", base)
    yield from _bad_mapping(base, (4, 6))
    item = "destinations[2]"
    yield "dtype", {item: base[item].to(torch.uint8)}, TypeError, (item, "uint8", "int8", "sources[2]")
    yield "heads", {item: base[item][:, :, :1].contiguous()}, ValueError, (item, "shape", "sources[2]")
