"""Each value out of range is refused with its name, what it was and what is allowed; each bound itself is accepted."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastattn import SamplingParams

NAN, INF = math.nan, math.inf
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 257, 1.0, "1", True, None],
    "temperature": [-0.1, 100.5, NAN, INF, "1", None, True],
    "top_p": [0, -0.5, 1.01, NAN, "0.9", None],
    "top_k": [-2, 2**31, 1.5, "3", None, True],
    "min_p": [-0.1, 1.1, NAN, "0", None],
    "seed": [2**63, -(2**63) - 1, 1.0, "7", True],
    "max_tokens": [0, -1, 2**31, 1.5, "9", True],
    "min_tokens": [-1, 1.5, None, True],
    "stop": ["", [""], [1], ["a"] * 17, 3],
    "stop_token_ids": [[-1], ["a"], [1.5], [2**31], list(range(1025)), 7],
    "ignore_eos": [1, None, "yes"],
    "presence_penalty": [-2.1, 2.1, NAN, None, "0"],
    "frequency_penalty": [-2.1, 2.1, INF, None],
    "repetition_penalty": [0, -1, 11, NAN, None],
    "logit_bias": [{-1: 0.0}, {"a": 0.0}, {1: NAN}, {1: 1001}, {1: "x"}, [1], dict.fromkeys(range(1025), 0.0)],
    "logprobs": [-1, 65, 1.0, True],
    "prompt_logprobs": [-1, 65, "2"],
    "skip_special_tokens": [0, None],
    "include_stop_str_in_output": [1, "no"],
    "output_kind": ["all", None, 1],
    "structured_output": ["[0-9]+", {"kind": "regex", "value": "a"}, True],
}
GOOD: dict[str, list[Any]] = {
    "n": [1, 256],
    "temperature": [0, 0.0, 1e-6, 100],
    "top_p": [1e-9, 1, 1.0],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "min_p": [0, 1],
    "seed": [None, 0, -(2**63), 2**63 - 1],
    "max_tokens": [None, 1, 2**31 - 1],
    "min_tokens": [0, 16],
    "stop": [None, "x", ["x", "yy"], ("z",), []],
    "stop_token_ids": [None, [], [0], {5}],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2.0],
    "repetition_penalty": [0.01, 10],
    "logit_bias": [None, {}, {0: -1000, 5: 1000.0}],
    "logprobs": [None, 0, 64],
    "prompt_logprobs": [None, 0, 64],
    "output_kind": ["cumulative", "delta", "final"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_is_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="allowed is") as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    shown = value if name != "stop" or not isinstance(value, str) else (value,)
    assert message.startswith(f"SamplingParams: {name} is {shown!r}, allowed is ")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_bounds_are_accepted(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(ValueError, match="min_tokens is 5, allowed is at most max_tokens = 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    SamplingParams(min_tokens=5, max_tokens=None)


def test_every_field_has_a_bad_value_here() -> None:
    fields = {name for name, field in SamplingParams.__dataclass_fields__.items() if field.init}
    assert fields == set(BAD)


def test_what_the_owner_changes_later_changes_nothing() -> None:
    ids, bias, stop = [1], {2: 1.0}, ["a"]
    params = SamplingParams(stop_token_ids=ids, logit_bias=bias, stop=stop)
    ids.append(2)
    bias[3] = 2.0
    stop.append("b")
    assert params.stop_token_ids == (1,) and params.logit_bias == {2: 1.0} and params.stop_strings == ("a",)
