"""One request's tokens and blocks: against Python lists, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastattn._runtime import TokenSequence

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=8)
SIZES = st.integers(-2, 40)


class TokenSequenceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.seq = TokenSequence([])
        self.tokens: list[int] = []
        self.drafts: list[int] = []
        self.blocks: list[int] = []
        self.num_computed = 0

    @property
    def has_unknown(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] < 0

    @rule(row=st.integers(-1, 3))
    def append_unknown(self, row: int) -> None:
        if row < 0 or self.has_unknown:
            with pytest.raises(ValueError, match="row is -1, allowed is 0 to" if row < 0 else "not known yet"):
                self.seq.append_unknown(row)
        else:
            self.seq.append_unknown(row)
            self.tokens.append(-1 - row)
            self.drafts = []

    @rule(token=st.integers(-1, 5))
    def settle(self, token: int) -> None:
        if token < 0 or not self.has_unknown:
            with pytest.raises(
                ValueError, match="token is -1, allowed is 0 to" if token < 0 else "last token is known"
            ):
                self.seq.settle(token)
        else:
            self.seq.settle(token)
            self.tokens[-1] = token

    @rule(tokens=TOKENS)
    def extend(self, tokens: list[int]) -> None:
        if self.has_unknown:
            with pytest.raises(ValueError, match="the last token is not known yet"):
                self.seq.extend(tokens)
            return
        self.seq.extend(tokens)
        self.tokens += tokens
        self.drafts = []

    @rule(token=st.integers(-2, 2**31 - 1))
    def append(self, token: int) -> None:
        if token < 0:
            with pytest.raises(ValueError, match=f"token is {token}, allowed is 0 to"):
                self.seq.append(token)
        elif self.has_unknown:
            with pytest.raises(ValueError, match="the last token is not known yet"):
                self.seq.append(token)
        else:
            self.seq.append(token)
            self.tokens.append(token)
            self.drafts = []

    @rule(tokens=st.lists(st.integers(-1, 2**31 - 1), max_size=4))
    def draft(self, tokens: list[int]) -> None:
        if min(tokens, default=0) < 0:
            with pytest.raises(ValueError, match=r"TokenSequence.drafts: token is -1, allowed is 0 to"):
                self.seq.drafts = tokens
        else:
            self.seq.drafts = tokens
            self.drafts = tokens

    @rule(length=SIZES)
    def truncate(self, length: int) -> None:
        if self.num_computed <= length <= len(self.tokens):
            self.seq.truncate(length)
            del self.tokens[length:]
            self.drafts = []
        else:
            with pytest.raises(
                ValueError, match=f"length is {length}, allowed is num_computed = {self.num_computed} to"
            ):
                self.seq.truncate(length)

    @rule(count=SIZES)
    def compute(self, count: int) -> None:
        if 0 <= count <= len(self.tokens):
            self.seq.num_computed = count
            self.num_computed = count
        else:
            with pytest.raises(ValueError, match=f"num_computed is {count}, allowed is 0 to {len(self.tokens)}"):
                self.seq.num_computed = count

    @rule(blocks=st.lists(st.integers(-1, 9), max_size=4))
    def add_blocks(self, blocks: list[int]) -> None:
        if min(blocks, default=0) < 0:
            with pytest.raises(ValueError, match="block is -1, allowed is 0 or more"):
                self.seq.add_blocks(blocks)
        else:
            self.seq.add_blocks(blocks)
            self.blocks += blocks

    @rule()
    def take_blocks(self) -> None:
        assert self.seq.take_blocks() == self.blocks
        self.blocks, self.drafts, self.num_computed = [], [], 0

    @rule(start=SIZES, end=SIZES)
    def read(self, start: int, end: int) -> None:
        stop = len(self.tokens) if end == -1 else end
        if 0 <= start <= stop <= len(self.tokens):
            assert self.seq.tokens(start, end) == self.tokens[start:stop]
        else:
            with pytest.raises(ValueError, match=f"start is {start} and end {stop}, allowed is"):
                self.seq.tokens(start, end)

    @invariant()
    def agrees(self) -> None:
        assert (len(self.seq), self.seq.tokens()) == (len(self.tokens), self.tokens)
        assert (self.seq.num_drafts, self.seq.drafts) == (len(self.drafts), self.drafts)
        assert (self.seq.num_blocks, self.seq.blocks()) == (len(self.blocks), self.blocks)
        assert self.seq.num_computed == self.num_computed
        assert self.seq.has_unknown == self.has_unknown


TokenSequenceMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestTokenSequenceMachine = TokenSequenceMachine.TestCase

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: TokenSequence([1, -5]), "TokenSequence: token is -5, allowed is 0 to 2**31 - 1"),
        (lambda s: s.extend([1, -5]), "TokenSequence.extend: token is -5, allowed is 0 to 2**31 - 1"),
        (lambda s: s.set_sampling(-1.0, 0, 1.0, 0.0, 0), "TokenSequence.set_sampling: temperature is -1, allowed is 0 or more"),
        (lambda s: s.set_sampling(NAN, 0, 1.0, 0.0, 0), "TokenSequence.set_sampling: temperature is nan, allowed is 0 or more"),
        (lambda s: s.set_sampling(1.0, -1, 1.0, 0.0, 0), "TokenSequence.set_sampling: top_k is -1, allowed is 0 to 2**31 - 1"),
        (lambda s: s.set_sampling(1.0, 0, 0.0, 0.0, 0), "TokenSequence.set_sampling: top_p is 0, allowed is above 0, up to 1"),
        (lambda s: s.set_sampling(1.0, 0, NAN, 0.0, 0), "TokenSequence.set_sampling: top_p is nan, allowed is above 0, up to 1"),
        (lambda s: s.set_sampling(1.0, 0, 1.0, 1.5, 0), "TokenSequence.set_sampling: min_p is 1.5, allowed is 0 to 1"),
    ],
)  # fmt: skip
def test_refusals(call: Callable[[TokenSequence], object], message: str) -> None:
    seq = TokenSequence([7, 8])
    with pytest.raises(ValueError) as caught:
        call(seq)
    assert str(caught.value) == message
    assert seq.tokens() == [7, 8]


@pytest.mark.parametrize("bad", [None, "text", [1.5], [2**31], 5])
def test_what_is_no_list_of_ids_is_a_type_error(bad: object) -> None:
    with pytest.raises(TypeError):
        TokenSequence(bad)  # type: ignore[arg-type]
