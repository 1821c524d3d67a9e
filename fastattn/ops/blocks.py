"""Copies of KV blocks: inside a paged cache, and between it and pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.ops._args import overlaps
from fastattn.ops._library import define
from fastattn.ops.checks import INT32, TensorArg, check_range, compile_check, fail_type, fail_value, values_readable
from fastattn.reference import blocks as reference


def _fake(*_: object) -> None:
    return None


_copy_blocks = define(
    "copy_blocks(Tensor(a!)[] caches, Tensor block_mapping, Tensor? num_tokens) -> ()", reference.copy_blocks, _fake
)
_swap_blocks = define(
    "swap_blocks(Tensor[] sources, Tensor(a!)[] destinations, Tensor block_mapping) -> ()", reference.swap_blocks, _fake
)

_PAIRS = TensorArg("block_mapping", "pairs two", INT32)
_check_copy_blocks = compile_check("copy_blocks", _PAIRS, TensorArg("num_tokens", "pairs", INT32, optional=True))
_check_swap_blocks = compile_check("swap_blocks", _PAIRS)


def copy_blocks(caches: Sequence[Tensor], block_mapping: Tensor, num_tokens: Tensor | None = None) -> None:
    """Copy blocks of a paged cache to others of its blocks, in all layers at once: copy on write, and the beginning of a
    block for a prompt that shares it.

    caches: any number of (num_blocks, block_size, Hk, D) or (num_blocks, block_size, Hk), changed in place: keys and values
      of all layers, and of 8-bit caches the scales of their tokens; any dtypes, the last dimension contiguous.
    block_mapping: (pairs, 2) int32, the block to copy and the block to copy it to. A pair with -1 copies nothing, so that
      a captured graph serves any number of pairs up to its own. A block that is written is named once.
    num_tokens: (pairs) int32, how many tokens from the block's beginning on; None is all of it.

    One launch for 200 caches; it reads no value on the host. Raises TypeError for what is not a tensor or has another
    dtype, ValueError for anything else that does not fit. Blocks and counts are checked on the CPU, and on the GPU only with
    FASTATTN_VALIDATE_INPUTS=1.
    """
    _check_copy_blocks(block_mapping, num_tokens)
    _check_caches("copy_blocks", "caches", caches, block_mapping, mutated=True)
    _check_pairs("copy_blocks", block_mapping)
    if len(caches) == 0:
        return
    if values_readable(block_mapping):
        pairs = _read_pairs("copy_blocks", block_mapping, caches[0], caches[0])
        _check_no_overlap("copy_blocks", pairs, inside=True)
        if num_tokens is not None:
            meaning = "block_size from caches[0]"
            check_range("copy_blocks", "num_tokens", num_tokens, 0, caches[0].shape[1], meaning, caches[0])
    _copy_blocks(caches, block_mapping, num_tokens)


def swap_blocks(sources: Sequence[Tensor], destinations: Sequence[Tensor], block_mapping: Tensor) -> None:
    """Copy blocks of one paged cache to another, in all layers at once: from a GPU to pinned host memory, and back.

    sources, destinations: as many of each, (num_blocks, block_size, Hk, D) or (num_blocks, block_size, Hk), the same dtypes
      and shapes but for num_blocks, the last dimension contiguous. Each on block_mapping's device or in pinned memory;
      destinations are changed in place.
    block_mapping: (pairs, 2) int32, a block of the sources and the block of the destinations that it goes to. A pair with
      -1 copies nothing. No block of the destinations may be in two pairs.

    A kernel on 16 CTAs reads or writes the host's memory over PCIe, in the order of the stream, and may be captured: the
    host must not touch what is copied before that is done. Raises as `copy_blocks` does.
    """
    _check_swap_blocks(block_mapping)
    _check_caches("swap_blocks", "sources", sources, block_mapping, mutated=False)
    _check_caches("swap_blocks", "destinations", destinations, block_mapping, mutated=True)
    if len(sources) != len(destinations):
        fail_value("swap_blocks", f"destinations has {len(destinations)} caches, expected {len(sources)} as sources")
    for i, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        if source.dtype is not destination.dtype:
            fail_type(
                "swap_blocks", f"destinations[{i}] is {destination.dtype}, expected {source.dtype} as sources[{i}]"
            )
        if source.shape[1:] != destination.shape[1:]:
            fail_value(
                "swap_blocks",
                f"destinations[{i}] has shape {tuple(destination.shape)}, expected "
                f"{('num_blocks', *source.shape[1:])} from sources[{i}]",
            )
    _check_pairs("swap_blocks", block_mapping)
    if len(sources) == 0:
        return
    if values_readable(block_mapping):
        pairs = _read_pairs("swap_blocks", block_mapping, sources[0], destinations[0])
        _check_no_overlap("swap_blocks", pairs, inside=False)
    _swap_blocks(sources, destinations, block_mapping)


def _check_caches(op: str, name: str, caches: Sequence[Tensor], mapping: Tensor, mutated: bool) -> None:
    """Each of a list of caches; those of a swap may be in pinned memory."""
    if not isinstance(caches, (list, tuple)):
        fail_type(op, f"{name} is a {type(caches).__name__}, expected a list of tensors")
    may_be_pinned = op == "swap_blocks"
    device, blocks = mapping.device, None  # num_blocks and block_size of the first
    for i, t in enumerate(caches):
        if not isinstance(t, Tensor):
            fail_type(op, f"{name}[{i}] is a {type(t).__name__}, expected a Tensor")
        if t.layout is not torch.strided:
            fail_value(op, f"{name}[{i}] has layout {t.layout}, expected torch.strided")
        shape = t.shape
        if len(shape) not in (3, 4):
            fail_value(op, f"{name}[{i}] has {len(shape)} dimensions, expected (num_blocks, block_size, [Hk,] D)")
        if t.device != device and not (may_be_pinned and t.is_cpu and _is_pinned(t)):
            other = " or pinned memory" if may_be_pinned else ""
            fail_value(op, f"{name}[{i}] is on {t.device}, expected {device}{other} as block_mapping")
        blocks = blocks or shape[:2]
        if shape[:2] != blocks:
            fail_value(
                op,
                f"{name}[{i}] has shape {tuple(shape)}, expected num_blocks = {blocks[0]} and block_size = {blocks[1]} "
                f"from {name}[0] {tuple(caches[0].shape)}",
            )
        if not t.is_contiguous():
            if shape[-1] > 1 and t.stride(-1) != 1:
                fail_value(op, f"{name}[{i}] has strides {t.stride()}, expected a contiguous last dimension")
            if mutated and overlaps(t):
                fail_value(op, f"{name}[{i}] has strides {t.stride()}, expected elements that do not overlap")
        if t.requires_grad and torch.is_grad_enabled():
            fail_value(op, f"{name}[{i}] requires grad, and there is no backward: expected it detached")


def _is_pinned(t: Tensor) -> bool:
    """Whether a GPU can reach host memory. A traced tensor has none yet: then the kernel's own check says so."""
    return torch.compiler.is_compiling() or type(t) is not Tensor or t.is_pinned()


def _check_pairs(op: str, mapping: Tensor) -> None:
    if mapping.shape[1] != 2:
        fail_value(op, f"block_mapping has shape {tuple(mapping.shape)}, expected (pairs, 2)")


def _read_pairs(op: str, mapping: Tensor, source: Tensor, destination: Tensor) -> list[list[int]]:
    pairs: list[list[int]] = mapping.tolist()
    for i, pair in enumerate(pairs):
        for side, (block, cache) in enumerate(zip(pair, (source, destination), strict=True)):
            if not -1 <= block < cache.shape[0]:
                fail_value(
                    op, f"block_mapping[{i}, {side}] is {block}, expected -1 to num_blocks - 1 = {cache.shape[0] - 1}"
                )
    return [pair for pair in pairs if min(pair) >= 0]


def _check_no_overlap(op: str, pairs: list[list[int]], inside: bool) -> None:
    """No order of the copies may matter. inside: what is written could be read by another pair."""
    written: set[int] = set()
    read = {source for source, _ in pairs} if inside else set()
    for _, block in pairs:
        if block in written or block in read:
            other = "copied from, too" if block in read else "written by two pairs"
            fail_value(
                op, f"block_mapping writes block {block}, which is {other}: expected each written once and not read"
            )
        written.add(block)
