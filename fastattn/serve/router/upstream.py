"""Another OpenAI-compatible server as a Backend. Its address is the operator's, never a request's; it is not believed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from fastattn import __version__
from fastattn.serve.contract import DELTA_TEXTS, APIError, Chunk, RequestContext
from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from fastattn.serve.router.config import DeploymentConfig

_MAX_LINE_BYTES = 4 << 20
_MAX_ERROR_BYTES = 64 << 10
# Fields that concern this server alone.
_OWN_FIELDS = {"priority", "stream", "stream_options"}
_OBJECTS = {ChatCompletionRequest: "chat.completion.chunk", CompletionRequest: "text_completion"}
_PATHS = {ChatCompletionRequest: "/chat/completions", CompletionRequest: "/completions"}


class UpstreamError(APIError):
    """The upstream did not answer as it should. retry_after: seconds that it asked for."""

    def __init__(self, why: str, status: int = 502, retry_after: float | None = None) -> None:
        super().__init__(status, why, "server_error", code="upstream_error")
        self.retry_after = retry_after


class Upstream:
    """Close it at the end. transport: for tests."""

    def __init__(self, config: DeploymentConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        assert config.api_base is not None
        self._base, self._model, self._name = config.api_base, config.model or config.model_name, config.model_name
        headers = {"user-agent": f"fastattn/{__version__}", "accept-encoding": "identity"}
        if key := _key(config):
            headers["authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(config.timeout, connect=config.connect_timeout),
            limits=httpx.Limits(max_connections=1000, max_keepalive_connections=100),
            follow_redirects=False,
            trust_env=False,  # no proxy that the operator did not name here
            transport=transport,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def stream(
        self, request: ChatCompletionRequest | CompletionRequest, context: RequestContext
    ) -> AsyncIterator[Chunk]:
        """Raises UpstreamError, or the APIError that the upstream gave for a request that it refused."""
        body = request.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude=_OWN_FIELDS)
        body |= {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        url, seen = self._base + _PATHS[type(request)], _Progress()
        try:
            async with self._client.stream(
                "POST", url, json=body, headers={"x-request-id": context.request_id, **context.trace}
            ) as response:
                if response.status_code != 200:
                    raise await self._refusal(response)
                kind = response.headers.get("content-type", "").partition(";")[0].strip()
                if kind != "text/event-stream" or response.headers.get("content-encoding", "identity") != "identity":
                    raise UpstreamError(f"model {self._name!r}: its server answered with {kind[:40]!r}, not a stream")
                async for data in _events(response):
                    if data == b"[DONE]":
                        break
                    yield seen.check(data, _OBJECTS[type(request)])
        except httpx.TimeoutException:
            raise UpstreamError(f"model {self._name!r}: its server gave no sign of life in time", 504) from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise UpstreamError(
                f"model {self._name!r}: its server cannot be reached: {type(error).__name__}"
            ) from error
        except _BadStreamError as error:
            raise UpstreamError(f"model {self._name!r}: its server sent {error}") from None
        if not seen.is_finished:
            raise UpstreamError(f"model {self._name!r}: its server cut the answer")

    async def _refusal(self, response: httpx.Response) -> APIError:
        """4xx that concern the request go to the client in our words; the rest is the upstream's own trouble."""
        status, text = response.status_code, b""
        async for part in response.aiter_raw():
            text += part
            if len(text) > _MAX_ERROR_BYTES:
                break
        if status in (400, 413, 422):
            return APIError(400, _message(text) or f"model {self._name!r} refused the request", code="upstream_refused")
        if status == 429:
            return UpstreamError(f"model {self._name!r}: its server is busy", 429, _seconds(response) or 1.0)
        if status == 503:
            return UpstreamError(f"model {self._name!r}: its server is overloaded", 503, _seconds(response))
        return UpstreamError(f"model {self._name!r}: its server answered with status {status}")


class _BadStreamError(Exception):
    pass


class _Progress:
    """Checks chunks one by one, and whether every choice came to its end."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._ended: set[int] = set()

    @property
    def is_finished(self) -> bool:
        return bool(self._ended) and not self._open

    def check(self, data: bytes, kind: str) -> Chunk:
        try:
            # Stricter than json: no NaN and no half of a surrogate pair, which could not be sent on.
            chunk = msgspec.json.decode(data)
            msgspec.msgpack.encode(chunk)  # as the cache does
        except OverflowError:  # JSON's integers have any size, others' have 64 bits
            raise _BadStreamError("a number of more than 64 bits") from None
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise _BadStreamError("something that is not JSON") from None
        if isinstance(chunk, dict) and chunk.get("error"):
            raise _BadStreamError("an error in the middle of its answer")
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list) or not all(map(_is_choice, choices)) or not _is_usage(chunk.get("usage")):
            raise _BadStreamError("a chunk that is none")
        for choice in choices:
            ended = choice.get("finish_reason") is not None
            (self._ended if ended else self._open).add(choice["index"])
            if ended:
                self._open.discard(choice["index"])
        chunk["object"] = kind
        return chunk


def _is_choice(choice: Any) -> bool:
    """As far as others rely on it: an index, and text where text belongs."""
    if not isinstance(choice, dict) or not isinstance(choice.get("index"), int) or not 0 <= choice["index"] < 1024:
        return False
    delta = choice.get("delta") if choice.get("delta") is not None else {}
    calls = delta.get("tool_calls") if isinstance(delta, dict) else None
    texts = [choice.get("text"), choice.get("finish_reason")]
    texts += [delta.get(name) for name in ("role", *DELTA_TEXTS)] if isinstance(delta, dict) else [0]
    return (
        all(text is None or isinstance(text, str) for text in texts)
        and (calls is None or (isinstance(calls, list) and all(map(_is_call, calls))))
        and (choice.get("logprobs") is None or _is_logprobs(choice["logprobs"]))
    )


def _is_logprobs(found: Any) -> bool:
    return isinstance(found, dict) and all(rows is None or isinstance(rows, list) for rows in found.values())


def _is_usage(usage: Any) -> bool:
    """Nothing, or counts: they are added up for limits and costs."""
    if not isinstance(usage, dict):
        return usage is None
    counts = [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens") if name in usage]
    return all(isinstance(count, int) and 0 <= count < 2**53 for count in counts)


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not isinstance(call.get("index"), int) or not 0 <= call["index"] < 1024:
        return False
    function = call.get("function") or {}
    texts = (
        [call.get("id"), *(function.get(name) for name in ("name", "arguments"))] if isinstance(function, dict) else [0]
    )
    return all(text is None or isinstance(text, str) for text in texts)


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The `data:` of each event; of our peers', each is one line. Lines end in \\n: text may hold other line separators."""
    buffer = b""
    async for part in response.aiter_raw():
        *lines, buffer = (buffer + part).split(b"\n")
        if len(buffer) > _MAX_LINE_BYTES:
            raise _BadStreamError(f"a line of more than {_MAX_LINE_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _message(text: bytes) -> str | None:
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return message[:500] if isinstance(message, str) else None


def _seconds(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), 3600.0) if value.isascii() and value.isdigit() else None


def _key(config: DeploymentConfig) -> str | None:
    if config.api_key is not None:
        return config.api_key.get_secret_value()
    if config.api_key_file is None:
        return None
    try:
        key = config.api_key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"model {config.model_name!r}: api_key_file {config.api_key_file}: {error}") from None
    if not key.isascii() or not key.isprintable() or not key:
        raise ValueError(f"model {config.model_name!r}: api_key_file {config.api_key_file} holds no key")
    return key
