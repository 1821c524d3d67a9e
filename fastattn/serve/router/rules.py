"""Which rule of a route holds for a request."""

from __future__ import annotations

from fastattn.serve.contract import RequestContext
from fastattn.serve.patterns import compile_pattern
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest
from fastattn.serve.router.config import Condition, RouteConfig
from fastattn.serve.router.language import language_of

# A pattern sees so much of a message: a rule is no place to read a book.
_MAX_MATCHED_CHARS = 65_536


class Route:
    def __init__(self, config: RouteConfig) -> None:
        self._default = config.default
        self._rules = [(rule.name, _Matcher(rule.when), rule.use) for rule in config.rules]

    def choose(self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext) -> tuple[str, str]:
        """(what to use, why)."""
        for name, matcher, use in self._rules:
            if matcher.holds(request, context):
                return use, f"rule:{name}"
        return self._default, "default"


class _Matcher:
    def __init__(self, when: Condition) -> None:
        self._when = when
        self._matches = compile_pattern(when.matches) if when.matches else None
        self._headers = {name: compile_pattern(pattern) for name, pattern in (when.headers or {}).items()}

    def holds(self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext) -> bool:
        """The cheapest questions first."""
        when = self._when
        if when.tenants is not None and context.tenant not in when.tenants:
            return False
        if when.tools is not None and when.tools != bool(getattr(request, "tools", None)):
            return False
        if when.structured is not None and when.structured != _is_structured(request):
            return False
        for name, pattern in self._headers.items():
            value = context.request_headers.get(name)
            if value is None or pattern.fullmatch(value) is None:
                return False
        if when.min_prompt_chars is not None or when.max_prompt_chars is not None:
            length = prompt_chars(request)
            if not (when.min_prompt_chars or 0) <= length <= (when.max_prompt_chars or length):
                return False
        if self._matches is None and when.languages is None:
            return True
        text = last_text(request)[:_MAX_MATCHED_CHARS]
        if when.languages is not None and language_of(text) not in when.languages:
            return False
        return self._matches is None or self._matches.search(text) is not None


def prompt_chars(request: ChatCompletionRequest | CompletionRequest) -> int:
    """Characters of all messages, or of all prompts; a token id counts as four."""
    if isinstance(request, ChatCompletionRequest):
        return sum(len(message.text or "") for message in request.messages)
    return sum(len(prompt) if isinstance(prompt, str) else 4 * len(prompt) for prompt in request.prompts)


def last_text(request: ChatCompletionRequest | CompletionRequest) -> str:
    """What the user said last; "" for token ids."""
    if isinstance(request, ChatCompletionRequest):
        return next((m.text or "" for m in reversed(request.messages) if m.role == "user"), "")
    prompt = request.prompts[-1]
    return prompt if isinstance(prompt, str) else ""


def _is_structured(request: ChatCompletionRequest | CompletionRequest) -> bool:
    given = request.response_format
    return request.structure is not None or (given is not None and given.type != "text")
