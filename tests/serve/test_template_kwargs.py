"""Variables of chat templates that requests set."""

from __future__ import annotations

from typing import Any

import pytest

from fastattn.models.tokenizer import Tokenizer
from fastattn.serve.auth import Keys
from fastattn.serve.cache.key import request_key
from fastattn.serve.config import ServeConfig
from fastattn.serve.contract import APIError
from fastattn.serve.messages import TokenizerParts
from fastattn.serve.render_worker import Chat, answer
from fastattn.serve.renderer import Renderer
from fastattn.serve.state import ServerState
from tests.engine import tiny
from tests.serve.fakes import chat, saying, wait
from tests.serve.test_rate_limits import client_of

TEMPLATE = (
    "{% if enable_thinking is defined and not enable_thinking %}quick{% else %}slow{% endif %}{{ messages[0].content }}"
)


def renderer(template: str = TEMPLATE) -> Renderer:
    return Renderer(TokenizerParts("", None, [], False, False, template), 100, 1)


def test_they_reach_the_template() -> None:
    tokenizer = Tokenizer.from_parts(**tiny.make_tokenizer().parts() | {"chat_template": TEMPLATE})
    for variables, text in (
        ({}, "slowhi"),
        ({"enable_thinking": False}, "quickhi"),
        ({"enable_thinking": True}, "slowhi"),
    ):
        ids = answer(tokenizer, Chat([{"role": "user", "content": "hi"}], None, True, 100, variables)).ids[0]
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "low"}, "knows no reasoning_effort"),
        ({"chat_template_kwargs": {"thinking": True}}, "knows no thinking"),
    ],
)
def test_what_the_template_does_not_use_is_said(fields: dict[str, Any], expected: Any) -> None:
    variables = chat(**fields).template_variables
    if isinstance(expected, dict):
        assert renderer()._known(variables) == expected
        return
    with pytest.raises(APIError, match=expected) as caught:
        renderer()._known(variables)
    assert caught.value.status == 400 and caught.value.param in fields


def test_effort_is_a_variable_where_the_template_knows_it() -> None:
    assert renderer("{{ reasoning_effort }}")._known({"reasoning_effort": "none"}) == {"reasoning_effort": "none"}


@pytest.mark.parametrize(
    "given",
    [
        {"enable_thinking": [1]},
        {"enable_thinking": {}},
        {"enable_thinking": "a" * 257},
        {"not a name": 1},
        {f"a{i}": 1 for i in range(17)},
    ],
)
def test_only_a_few_small_scalars(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs"):
        chat(chat_template_kwargs=given)


def test_another_variable_is_another_answer_to_the_cache() -> None:
    keys = [request_key(chat(chat_template_kwargs={"thinking": value}), "", "", {}) for value in (True, False)]
    assert keys[0] != keys[1]


def test_only_names_that_the_operator_allows() -> None:
    state = ServerState(ServeConfig(model="m", template_kwargs=["thinking"]), Keys([]))
    state.chain = saying("a")

    async def run() -> None:
        async with client_of(state) as client:
            for name, status in (("thinking", 200), ("enable_thinking", 400)):
                body = chat(chat_template_kwargs={name: True}).model_dump(exclude_unset=True)
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == status, response.text
            assert response.json()["error"]["message"].endswith("is not allowed here, allowed are: thinking")

    wait(run())
