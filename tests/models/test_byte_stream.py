"""The text of a byte-level tokenizer's tokens: the pieces that the library's own stream gives, one by one and together."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders

from fastattn.models.tokenizer import ByteStream, Tokenizer, TokenStream
from tests.engine import tiny

PIPELINE = tiny.make_pipeline()
PIPELINE.add_tokens([AddedToken("<think>"), AddedToken("é €")])  # no bytes of the alphabet in the second


def made() -> Tokenizer:
    return Tokenizer(PIPELINE, bos_token_id=None, eos_token_ids=(1,), add_bos=False, add_eos=False, chat_template=None)


TOKENIZER = made()
# Half of them parts of characters, special, added or beyond the vocabulary.
IDS = st.lists(
    st.one_of(st.integers(0, TOKENIZER.vocab_size + 2), st.sampled_from([0, 1, *range(96, 112)])), max_size=40
)


@given(ids=IDS, cut=st.integers(0, 40), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_are_the_library_s(ids: list[int], cut: int, skip: bool) -> None:
    theirs, ours, together = TokenStream(PIPELINE, skip), TOKENIZER.stream(skip), TOKENIZER.stream(skip)
    assert isinstance(ours, ByteStream)
    expected = [theirs.step(token) for token in ids]
    assert [ours.step(token) for token in ids] == expected
    assert together.steps(ids[:cut]) + together.steps(ids[cut:]) == "".join(filter(None, expected))


def test_what_is_more_than_bytes_is_left_to_the_library() -> None:
    pipeline = tiny.make_pipeline()
    pipeline.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])
    stream = Tokenizer(
        pipeline, bos_token_id=None, eos_token_ids=(1,), add_bos=False, add_eos=False, chat_template=None
    ).stream()
    assert isinstance(stream, TokenStream)
    ids = TOKENIZER.encode("the tea")
    assert stream.steps(ids) == "the teb"
