"""What a router's configuration may say, and what is refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fastattn.serve.router import Router, RouterConfig
from tests.serve.fakes import (
    saying,
)


def test_configuration_says_all_that_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        RouterConfig.model_validate(
            {
                "model_list": [{"model_name": "a"}, {"model_name": "b", "api_base": "ftp://x"}, {"model_name": "c c", "engine": "c"}],
                "routes": {"auto": {"default": "a", "rules": [{"name": "x", "when": {"matches": "(?<=a)b"}, "use": "a"}]}},
                "colour": 1,
            }
        )  # fmt: skip
    text = str(caught.value)
    for part in (
        "expected either engine or api_base",
        "is no address",
        "model_list.2.model_name",
        "invalid perl operator",
        "colour",
    ):
        assert part in text, text


def test_names_in_the_configuration_must_be_known() -> None:
    with pytest.raises(ValidationError) as caught:
        RouterConfig.model_validate(
            {
                "model_list": [{"model_name": "a", "engine": "a"}],
                "routes": {"auto": {"default": "nobody"}, "a": {"default": "a"}},
                "cascades": {"c": {"first": "a", "then": "big", "threshold": -1.0}},
                "fallbacks": {"a": ["z"]},
                "model_group_alias": {"gpt": "y"},
            }
        )
    text = str(caught.value)
    for part in ("'nobody'", "'big'", "'z'", "'y'", "'a' is the name of several things", "known are a"):
        assert part in text, text
    with pytest.raises(ValueError, match=r"router.model_list\[0\].engine is 'b', known are a"):
        Router(
            RouterConfig.model_validate({"model_list": [{"model_name": "m", "engine": "b"}]}),
            {"a": saying("x")},
            {"a": ""},
        )


@pytest.mark.parametrize(
    "url", ["http://user:pw@host/v1", "file:///etc/passwd", "http://host/v1?x=1", "host/v1", "http://"]
)
def test_addresses(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RouterConfig.model_validate({"model_list": [{"model_name": "a", "api_base": url, "api_key": "secret-key"}]})
    assert "secret-key" not in str(caught.value)
