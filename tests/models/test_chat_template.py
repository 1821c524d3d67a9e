"""Chat templates: transformers' helpers, a sandbox, and errors of one line."""

from __future__ import annotations

import re
from datetime import datetime

import pytest

from fastattn.models.chat_template import ChatTemplate, ChatTemplateError

USER = [{"role": "user", "content": 'say "<b>" & é'}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render(USER, **variables)


def test_a_conversation() -> None:
    source = """{% for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif -%}
<|{{ m['role'] }}|>{{ m['content'] | trim }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
    messages = [{"role": "skip", "content": ""}, *USER]
    assert ChatTemplate(source).render(messages, add_generation_prompt=True) == '<|user|>say "<b>" & é\n<|assistant|>'


def test_helpers_of_transformers() -> None:
    assert render("{{ messages[0]['content'] | tojson }}") == '"say \\"<b>\\" & é"'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": [\n  2\n ]\n}'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{{ bos_token }}{{ missing }}", bos_token="<s>") == "<s>"


def test_what_the_template_raises_is_told() -> None:
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_a_template_cannot_reach_python(source: str) -> None:
    """Either an error, or nothing at all: jinja2 gives an undefined value for what is not safe."""
    try:
        out = render(source)
    except ChatTemplateError as error:
        out = re.sub(r"^the model's chat template failed: (SecurityError|UndefinedError): [^\n]*$", "", str(error))
    assert out in ("", "list")


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 | nothing }}", "{% for %}", "{{ 'a"])
def test_a_broken_template_is_told(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the model's chat template cannot be compiled"):
        ChatTemplate(source)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[0].content.nothing.at_all }}", "{{ 'a' + 1 }}"])
def test_a_template_that_fails_is_told(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"the model's chat template failed: \w+Error: "):
        render(source)


@pytest.mark.parametrize("message", ["hello", {"content": "x"}, {"role": 3, "content": "x"}, None])
def test_what_is_no_message_is_named(message: object) -> None:
    with pytest.raises(ChatTemplateError, match=r"messages\[1\] is .*, expected a mapping with a string 'role'"):
        ChatTemplate("{{ messages }}").render([*USER, message])  # type: ignore[list-item]
