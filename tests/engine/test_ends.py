"""Where a completion ends: stop strings and tokens, the end token, lengths; and its text."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.engine.engine import Engine
from fastattn.engine.output_processor import TextStream
from fastattn.models.tokenizer import Tokenizer
from tests.engine.requests import DRAWN, GREEDY, PROMPTS, MakeEngine, only, with_
from tests.engine.tiny import EOS, drain, run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_stop_strings(engine: Engine, tokenizer: Tokenizer) -> None:
    """Every short piece of a text as its stop string, most of them across the borders of tokens."""
    text, token_ids = (base := only(run(engine, PROMPTS[:1], DRAWN)[0])).text, base.token_ids
    stops = sorted({text[i : i + length] for length in (1, 2, 3, 5) for i in range(0, len(text) - length, 3)})
    cases = [(stop, include) for stop in stops if "\ufffd" not in stop for include in (False, True)]
    params = [with_(DRAWN, stop=stop, include_stop_str_in_output=include) for stop, include in cases]
    borders = 0
    for (stop, include), output in zip(cases, run(engine, PROMPTS[:1] * len(cases), params), strict=True):
        completion, at = only(output), text.index(stop)
        assert completion.text == text[: at + len(stop) if include else at], (stop, include)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == token_ids[: len(completion.token_ids)]
        # It ends with the token that completed the string, not later.
        assert stop in tokenizer.decode(completion.token_ids)
        assert stop not in tokenizer.decode(completion.token_ids[:-1])
        borders += stop not in tokenizer.token_text(completion.token_ids[-1])
    assert borders > 10


def test_the_earliest_of_several_stop_strings_wins(engine: Engine) -> None:
    text = only(run(engine, PROMPTS[:1], DRAWN)[0]).text
    late, early, never = text[20:22], text[8:12], "never said"
    completion = only(run(engine, PROMPTS[:1], with_(DRAWN, stop=[late, never, early]))[0])
    assert (completion.text, completion.stop_reason) == (text[: text.index(early)], early)


def test_what_may_become_a_stop_string_is_held_back(engine: Engine) -> None:
    """A stream never shows a character that a stop string takes away later, and shows all when it did not come."""
    text = only(run(engine, PROMPTS[:1], DRAWN)[0]).text
    for stop, expected in ((text[10:14], text[: text.index(text[10:14])]), (text[10:14] + "\x00", text)):
        engine.add_request("r", PROMPTS[0], with_(DRAWN, stop=stop, output_kind="delta"))
        shown = ""
        for output in drain(engine):
            shown += only(output).text
            assert expected.startswith(shown)
        assert shown == expected


class Letters:
    """A tokenizer whose tokens are texts."""

    def stream(self, skip_special_tokens: bool) -> Any:
        return self

    def step(self, piece: Any) -> Any:
        return piece


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    may_stop=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_what_is_held_back_is_the_longest_beginning(pieces: list[str], stops: list[str], may_stop: bool) -> None:
    stream = TextStream(Letters(), tuple(stops), True, False)  # type: ignore[arg-type]
    for piece in pieces:
        if stream.push(piece, may_stop) is not None:  # type: ignore[arg-type]
            return
        ends = [stop[:n] for stop in stops for n in range(len(stop)) if stream.text.endswith(stop[:n])]
        if piece:
            assert len(stream.text) - stream.num_released == max(map(len, ends))


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3),
    min_pieces=st.integers(0, 8),
)
@settings(max_examples=500, deadline=None)
def test_only_what_ends_now_stops(pieces: list[str], stops: list[str], min_pieces: int) -> None:
    """And not a short one that came when nothing might stop yet: that has been given out."""
    stream, shown = TextStream(Letters(), tuple(stops), False, False), ""  # type: ignore[arg-type]
    for count, piece in enumerate(pieces, 1):
        stop = stream.push(piece, count >= min_pieces)  # type: ignore[arg-type]
        assert stream.text.startswith(shown)
        shown = stream.text[: stream.num_released]
        if stop is not None:
            assert len(stream.text) + len(stop) > len("".join(pieces[: count - 1]))
            return
        ended = [
            one for one in stops for n in range(len(piece)) if ("".join(pieces[:count]))[: -n or None].endswith(one)
        ]
        assert count < min_pieces or not ended


def test_long_stop_strings_cost_no_time() -> None:
    """As many and as long as a client may send, none of which comes: once 36 ms a token."""
    stops = tuple("e" + "xyz " * 1000 + chr(65 + i) for i in range(16))
    stream = TextStream(Letters(), stops, False, False)  # type: ignore[arg-type]
    begin = time.process_time()
    for _ in range(2000):
        stream.push("abcd")  # type: ignore[arg-type]
    assert time.process_time() - begin < 4, "2 ms a token"


def test_stop_token_ids(engine: Engine, tokenizer: Tokenizer) -> None:
    base = only(run(engine, PROMPTS[:1], DRAWN)[0]).token_ids
    for token in set(base[3:20]):
        completion = only(run(engine, PROMPTS[:1], with_(DRAWN, stop_token_ids=[token, 98]))[0])
        end = min(base.index(t) for t in (token, 98) if t in base)
        assert completion.token_ids == base[: end + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", base[end])
        assert completion.text == tokenizer.decode(base[:end]).rstrip("\ufffd")


def test_the_end_token(engine: Engine) -> None:
    likely = with_(DRAWN, logit_bias={EOS: 100.0}, max_tokens=12)
    ended, went_on, delayed = (
        only(output)
        for output in run(
            engine,
            PROMPTS[:1] * 3,
            [with_(likely, ignore_eos=False), likely, with_(likely, ignore_eos=False, min_tokens=5)],
        )
    )
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([EOS], "", "stop", EOS)
    assert (went_on.token_ids, went_on.finish_reason, went_on.stop_reason) == ([EOS] * 12, "length", None)
    assert EOS not in delayed.token_ids[:5]
    assert delayed.token_ids[5:] == [EOS]


def test_min_tokens_delays_stop_tokens_and_strings(engine: Engine) -> None:
    base = only(run(engine, PROMPTS[:1], DRAWN)[0])
    banned = only(run(engine, PROMPTS[:1], with_(DRAWN, stop_token_ids=base.token_ids[:8], min_tokens=20))[0])
    assert not set(banned.token_ids[:20]) & set(base.token_ids[:8])
    stop = base.text[4]
    later = only(run(engine, PROMPTS[:1], with_(DRAWN, stop=stop, min_tokens=20))[0])
    assert later.token_ids == base.token_ids[: len(later.token_ids)]
    assert len(later.token_ids) >= 20


def test_length_ends_at_max_tokens_and_at_the_models_length(make_engine: MakeEngine) -> None:
    engine = make_engine(max_model_len=32)
    for max_tokens in (1, 2, 9):
        completion = only(run(engine, ["the"], with_(GREEDY, max_tokens=max_tokens))[0])
        assert (len(completion.token_ids), completion.finish_reason) == (max_tokens, "length")
    for max_tokens in (None, 1000):
        (output,) = run(engine, ["the quick"], with_(GREEDY, max_tokens=max_tokens))
        assert len(output.prompt_token_ids) + len(only(output).token_ids) == 32
    (output,) = run(engine, [{"prompt_token_ids": [5] * 31}], GREEDY)
    assert len(only(output).token_ids) == 1


def test_text_is_what_the_tokenizer_says(engine: Engine, tokenizer: Tokenizer) -> None:
    for output in run(engine, PROMPTS, with_(DRAWN, max_tokens=100)):
        completion = only(output)
        rest = tokenizer.decode(completion.token_ids).removeprefix(completion.text)
        assert rest in ("", "\ufffd")  # the beginning of a character that never came is not shown


def test_special_tokens_in_the_text(engine: Engine) -> None:
    params = with_(GREEDY, logit_bias={EOS: 100.0}, max_tokens=2)
    hidden, shown = run(engine, ["a", "a"], [params, with_(params, skip_special_tokens=False)])
    assert (only(hidden).text, only(shown).text) == ("", "</s></s>")
