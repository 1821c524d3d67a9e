"""The arrays of a step against numpy written from docs/design/foundation.md; refusals that leave the buffer as it was."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastattn._runtime import BatchBuilder, BatchInfo, TokenSequence

BLOCK_SIZE, MAX_TOKENS, MAX_SEQS, MAX_BLOCKS, MAX_LOGITS = 4, 24, 5, 6, 4
PER_LOGIT = ("logits_indices", "temperature", "top_p", "min_p", "top_k", "seed", "sample_position")


@dataclass(frozen=True)
class Spec:
    """One sequence and what a step computes of it."""

    tokens: list[int]
    num_computed: int
    num_tokens: int
    blocks: list[int]
    sampling: tuple[float, int, float, float, int] = (0.0, 0, 1.0, 0.0, 0)
    drafts: tuple[int, ...] = ()

    def build(self) -> TokenSequence:
        seq = TokenSequence(self.tokens)
        seq.add_blocks(self.blocks)
        seq.num_computed = self.num_computed
        seq.set_sampling(*self.sampling)
        seq.drafts = self.drafts
        return seq


class Buffer:
    """A buffer filled with a pattern, so that it shows what was written."""

    def __init__(self, builder: BatchBuilder) -> None:
        self.builder = builder
        raw = np.full(builder.nbytes + 32, 0xA5, dtype=np.uint8)
        start = -raw.ctypes.data % 16
        self.bytes = raw[start : start + builder.nbytes + 16]  # the last 16 are past its end
        self.address = self.bytes.ctypes.data

    def fill(
        self, specs: list[Spec], pad: int = 0, pad_num_tokens: int = 0, cascade: bool = False, shared: int = 0
    ) -> BatchInfo:
        counts = [s.num_tokens for s in specs]
        built = [s.build() for s in specs]
        return self.builder.build(self.address, built, counts, pad, pad_num_tokens, cascade, shared)

    def field(self, name: str) -> NDArray[Any]:
        offset, dtype, shape = self.builder.layout()[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[offset : offset + size].view(dtype).reshape(shape)


@pytest.fixture
def buffer() -> Buffer:
    return Buffer(BatchBuilder(MAX_TOKENS, MAX_SEQS, MAX_BLOCKS, BLOCK_SIZE, MAX_LOGITS))


def expected_arrays(specs: list[Spec], pad: int, pad_num_tokens: int) -> dict[str, NDArray[Any]]:
    """What the contract says, token by token."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("token_ids", "positions", "slot_mapping", "seqused_k", *PER_LOGIT)
    }
    cu_seqlens = [0]

    def sampling(values: tuple[float, int, float, float, int], position: int) -> None:
        for name, value in zip(("temperature", "top_k", "top_p", "min_p", "seed"), values, strict=True):
            columns[name].append(value)
        columns["logits_indices"].append(len(columns["token_ids"]) - 1)
        columns["sample_position"].append(position)

    for spec in specs:
        end = spec.num_computed + spec.num_tokens
        for position in range(spec.num_computed, end):
            columns["token_ids"].append([*spec.tokens, *spec.drafts][position])
            columns["positions"].append(position)
            columns["slot_mapping"].append(spec.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            if position >= len(spec.tokens) - 1:
                sampling(spec.sampling, position + 1)
        columns["seqused_k"].append(end)
        cu_seqlens.append(len(columns["token_ids"]))
    for i in range(pad):
        for _ in range((i + 1) * pad_num_tokens // pad - i * pad_num_tokens // pad):
            for name, value in (("token_ids", 0), ("positions", 0), ("slot_mapping", -1)):
                columns[name].append(value)
            sampling((0.0, 0, 1.0, 0.0, 0), 0)
        columns["seqused_k"].append(0)
        cu_seqlens.append(len(columns["token_ids"]))
    dtypes = {"temperature": "f4", "top_p": "f4", "min_p": "f4", "seed": "i8", "sample_position": "i8"}
    arrays = {name: np.array(values, dtype=dtypes.get(name, "i4")) for name, values in columns.items()}
    return arrays | {"cu_seqlens_q": np.array(cu_seqlens, dtype="i4")}


@st.composite
def spec_lists(draw: st.DrawFn) -> tuple[list[Spec], int, int]:
    pad = draw(st.integers(0, 2))
    pad_num_tokens = draw(st.integers(0, pad * MAX_LOGITS))
    specs: list[Spec] = []
    room = MAX_TOKENS - pad_num_tokens
    for _ in range(draw(st.integers(0, MAX_SEQS - pad))):
        if room == 0:
            break
        tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=MAX_BLOCKS * BLOCK_SIZE))
        num_computed = draw(st.integers(0, len(tokens) - 1))
        own = len(tokens) - num_computed
        drafts = draw(st.lists(st.integers(0, 2**31 - 1), max_size=min(5, MAX_BLOCKS * BLOCK_SIZE - len(tokens))))
        num_tokens = draw(st.integers(1, min(own + min(len(drafts), MAX_LOGITS - 1), room)))
        needed = -(-(num_computed + num_tokens) // BLOCK_SIZE)
        num_blocks = draw(st.integers(needed, MAX_BLOCKS))
        blocks = draw(st.lists(st.integers(0, (2**31 - 1) // BLOCK_SIZE - 1), min_size=num_blocks, max_size=num_blocks))
        unit = st.floats(0, 1, width=32)
        sampling = (
            draw(unit),
            draw(st.integers(0, 2**31 - 1)),
            draw(st.floats(0.125, 1, width=32)),
            draw(unit),
            draw(st.integers(-(2**63), 2**63 - 1)),
        )
        specs.append(Spec(tokens, num_computed, num_tokens, blocks, sampling, tuple(drafts)))
        room -= num_tokens
    return specs, pad, pad_num_tokens


@given(case=spec_lists())
@settings(max_examples=300, deadline=None)
def test_equals_numpy(case: tuple[list[Spec], int, int]) -> None:
    specs, pad, pad_num_tokens = case
    buffer = Buffer(BatchBuilder(MAX_TOKENS, MAX_SEQS, MAX_BLOCKS, BLOCK_SIZE, MAX_LOGITS))
    untouched = buffer.bytes.copy()
    info = buffer.fill(specs, pad, pad_num_tokens)
    expected = expected_arrays(specs, pad, pad_num_tokens)
    for name, array in expected.items():
        field = buffer.field(name)
        assert field.dtype == array.dtype
        np.testing.assert_array_equal(field[: len(array)], array, err_msg=name)
        assert (field[len(array) :].view(np.uint8) == 0xA5).all(), f"{name} is written past what the step uses"
    table = buffer.field("block_table")
    for row, spec in enumerate(specs):
        assert table[row, : len(spec.blocks)].tolist() == spec.blocks
    assert (table[len(specs) : len(specs) + pad, 0] == 0).all()
    assert (info.num_tokens, info.num_seqs) == (len(expected["token_ids"]), len(specs) + pad)
    assert info.num_logits == len(expected["logits_indices"])
    assert info.max_seqlen_q == max(
        [spec.num_tokens for spec in specs] + [-(-pad_num_tokens // max(pad, 1))], default=0
    )
    assert info.max_seqlen_k == max((spec.num_computed + spec.num_tokens for spec in specs), default=0)
    # A copy of the first nbytes carries the whole step.
    assert info.nbytes == buffer.builder.layout()["block_table"][0] + 4 * MAX_BLOCKS * info.num_seqs
    np.testing.assert_array_equal(buffer.bytes[info.nbytes :], untouched[info.nbytes :])


def test_layout() -> None:
    builder = BatchBuilder(7, 3, 5, 16, 2)
    layout = builder.layout()
    assert {name: (dtype, shape) for name, (_, dtype, shape) in layout.items()} == {
        "token_ids": ("int32", (7,)),
        "positions": ("int32", (7,)),
        "slot_mapping": ("int32", (7,)),
        "cu_seqlens_q": ("int32", (6,)),
        "seqused_k": ("int32", (4,)),
        "logits_indices": ("int32", (6,)),
        "top_k": ("int32", (6,)),
        "temperature": ("float32", (6,)),
        "top_p": ("float32", (6,)),
        "min_p": ("float32", (6,)),
        "seed": ("int64", (6,)),
        "sample_position": ("int64", (6,)),
        "block_table": ("int32", (4, 5)),
    }
    assert list(layout)[-1] == "block_table"
    end = 0
    for offset, dtype, shape in layout.values():
        assert offset % 16 == 0
        assert end <= offset < end + 16
        end = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert end <= builder.nbytes < end + 16


def test_ids_and_slots_at_the_ends_of_32_bits() -> None:
    buffer = Buffer(BatchBuilder(1, 1, 1, 1))
    buffer.fill([Spec([2**31 - 1], 0, 1, [2**31 - 2])])
    assert buffer.field("token_ids").tolist() == [2**31 - 1]
    assert buffer.field("slot_mapping").tolist() == [2**31 - 2]


DECODE = Spec([1, 2, 3, 4, 5], 4, 1, [8, 9])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens[1] is 0, allowed is 1 to 1"),
        ({"num_tokens": 2}, "num_tokens[1] is 2, allowed is 1 to 1"),
        ({"num_tokens": -1}, "num_tokens[1] is -1, allowed is 1 to 1"),
        ({"num_computed": 5}, "num_tokens[1] is 1, allowed is 1 to 0"),
        ({"tokens": [], "num_computed": 0}, "num_tokens[1] is 1, allowed is 1 to 0"),
        ({"num_computed": 5, "drafts": (6, 7)}, "num_tokens[1] is 1, allowed is 1 to 0"),
        ({"num_tokens": 4, "drafts": (6, 7)}, "num_tokens[1] is 4, allowed is 1 to 3"),
        ({"num_tokens": 5, "drafts": (6, 7, 8, 9)}, "num_tokens[1] has 4 drafts, allowed are up to 3"),
        ({"num_tokens": 3, "blocks": [8], "drafts": (6, 7)}, "sequences[1] has 1 blocks, expected at least 2"),
        ({"blocks": []}, "sequences[1] has 0 blocks, expected at least 2"),
        ({"blocks": [8]}, "sequences[1] has 1 blocks, expected at least 2"),
        ({"blocks": [1, 2, 3, 4, 5, 6, 7]}, "sequences[1] has 7 blocks, allowed are up to 6"),
        ({"blocks": [8, 2**29]}, "sequences[1] has block 536870912, whose slots do not fit 32 bits"),
    ],
)
def test_a_bad_sequence_leaves_the_buffer_untouched(buffer: Buffer, changes: dict[str, Any], message: str) -> None:
    """The bad one comes after a good one, which must not have been written either."""
    before = buffer.bytes.copy()
    with pytest.raises(ValueError) as caught:
        buffer.fill([DECODE, dataclasses.replace(DECODE, **changes)])
    assert str(caught.value) == f"BatchBuilder.build: {message}"
    np.testing.assert_array_equal(buffer.bytes, before)


def test_a_bad_call_leaves_the_buffer_untouched(buffer: Buffer) -> None:
    before = buffer.bytes.copy()
    seq = DECODE.build()
    long = Spec(list(range(20)), 0, 20, [0, 1, 2, 3, 4]).build()
    bad = {
        "num_tokens has 1 entries, expected 2": (buffer.address, [seq, seq], [1], 0),
        "5 sequences and pad_num_seqs 1, allowed are up to 5 together": (buffer.address, [seq] * 5, [1] * 5, 1),
        "6 sequences and pad_num_seqs 0, allowed are up to 5 together": (buffer.address, [seq] * 6, [1] * 6, 0),
        "1 sequences and pad_num_seqs -1, allowed are up to 5 together": (buffer.address, [seq], [1], -1),
        "num_tokens sums to 40, allowed is up to 24": (buffer.address, [long, long], [20, 20], 0),
        "address is 0, expected a multiple of 16": (0, [seq], [1], 0),
        f"address is {buffer.address + 4}, expected a multiple of 16": (buffer.address + 4, [seq], [1], 0),
        "sequences[0] is None": (buffer.address, [None], [1], 0),
        "pad_num_tokens is -1, allowed is 0 to 4 with pad_num_seqs 1": (buffer.address, [], [], 1, -1),
        "pad_num_tokens is 9, allowed is 0 to 8 with pad_num_seqs 2": (buffer.address, [], [], 2, 9),
        "pad_num_tokens is 1, allowed is 0 to 0 with pad_num_seqs 0": (buffer.address, [seq], [1], 0, 1),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError) as caught:
            buffer.builder.build(*args)  # type: ignore[arg-type]
        assert str(caught.value) == f"BatchBuilder.build: {message}"
    np.testing.assert_array_equal(buffer.bytes, before)


@given(case=spec_lists(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_cascade_equals_the_batch_without_it(case: tuple[list[Spec], int, int], data: st.DataObject) -> None:
    """What all share is one more row, and each row begins behind it."""
    specs, pad, pad_num_tokens = case
    most = min((s.num_computed // BLOCK_SIZE for s in specs), default=0)
    shared = data.draw(st.integers(0, most))
    specs = [dataclasses.replace(s, blocks=[*specs[0].blocks[:shared], *s.blocks[shared:]]) for s in specs]
    builder = BatchBuilder(MAX_TOKENS, MAX_SEQS, MAX_BLOCKS, BLOCK_SIZE, MAX_LOGITS)
    plain, buffer = Buffer(builder), Buffer(builder)
    expected = plain.fill(specs, pad, pad_num_tokens)
    info = buffer.fill(specs, pad, pad_num_tokens, True, shared)
    n = expected.num_seqs
    assert (info.num_tokens, info.num_seqs, info.num_logits) == (expected.num_tokens, n, expected.num_logits)
    assert info.nbytes == expected.nbytes + 4 * MAX_BLOCKS
    for name in builder.layout():
        if name not in ("cu_seqlens_q", "seqused_k", "block_table"):
            np.testing.assert_array_equal(buffer.field(name), plain.field(name), err_msg=name)
    ends, used, table = (buffer.field(name) for name in ("cu_seqlens_q", "seqused_k", "block_table"))
    np.testing.assert_array_equal(ends[: n + 1], plain.field("cu_seqlens_q")[: n + 1])
    assert ends[n + 1 : n + 3].tolist() == [0, info.num_tokens]
    assert used[n] == shared * BLOCK_SIZE
    np.testing.assert_array_equal(used[: len(specs)], plain.field("seqused_k")[: len(specs)] - shared * BLOCK_SIZE)
    assert (used[len(specs) : n] == 0).all()
    assert table[n, : max(shared, 1)].tolist() == (specs[0].blocks[:shared] if shared else [0])
    for row, spec in enumerate(specs):
        assert table[row, : len(spec.blocks) - shared].tolist() == spec.blocks[shared:]


@pytest.mark.parametrize(
    ("second", "cascade", "shared", "message"),
    [
        (DECODE, False, 1, "num_shared_blocks is 1, allowed is 0 to 0 without cascade"),
        (DECODE, True, -1, "num_shared_blocks is -1, allowed is 0 to 6"),
        (DECODE, True, 7, "num_shared_blocks is 7, allowed is 0 to 6"),
        (DECODE, True, 2, "num_shared_blocks is 2, allowed is up to 1, which sequences[0] has computed"),
        (
            dataclasses.replace(DECODE, num_computed=3, num_tokens=2),
            True,
            1,
            "num_shared_blocks is 1, allowed is up to 0, which sequences[1] has computed",
        ),
        (
            dataclasses.replace(DECODE, blocks=[7, 9]),
            True,
            1,
            "num_shared_blocks is 1, but the first blocks of sequences[1] are not those of sequences[0]",
        ),
    ],
)
def test_a_bad_cascade_leaves_the_buffer_untouched(
    buffer: Buffer, second: Spec, cascade: bool, shared: int, message: str
) -> None:
    before = buffer.bytes.copy()
    with pytest.raises(ValueError) as caught:
        buffer.fill([DECODE, second], 0, 0, cascade, shared)
    assert str(caught.value) == f"BatchBuilder.build: {message}"
    np.testing.assert_array_equal(buffer.bytes, before)


def test_padding_counts_against_the_tokens() -> None:
    buffer = Buffer(BatchBuilder(2, 4, 2, BLOCK_SIZE))
    with pytest.raises(ValueError, match="num_tokens sums to 3, allowed is up to 2"):
        buffer.fill([DECODE], pad=2, pad_num_tokens=2)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1, 1), "max_num_tokens is 0, allowed is 1 to 2**28"),
        ((1, -1, 1, 1), "max_num_seqs is -1, allowed is 1 to 2**28"),
        ((1, 1, 0, 1), "max_blocks_per_seq is 0, allowed is 1 to 2**28"),
        ((1, 1, 1, 2**29), "block_size is 536870912, allowed is 1 to 2**28"),
        ((1, 2**16, 2**15, 1), "max_num_seqs * max_blocks_per_seq is 2147483648, allowed is up to 2**30"),
        ((1, 1, 1, 1, 0), "max_logits_per_seq is 0, allowed is 1 to 2**28"),
        ((1, 2**16, 1, 1, 2**15), "max_num_seqs * max_logits_per_seq is 2147483648, allowed is up to 2**28"),
    ],
)
def test_bad_capacities(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        BatchBuilder(*sizes)
    assert str(caught.value) == f"BatchBuilder: {message}"
