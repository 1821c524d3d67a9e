"""What our own clients (`fastattn chat --url`, `fastattn bench serve`) share to talk to an OpenAI-compatible server.

It needs httpx, which comes with fastattn[server] and fastattn[bench], and reads nothing from the environment: no proxy, no
credentials of a netrc file.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

DONE = "[DONE]"


class ServerError(ConnectionError):
    """The server could not be reached, refused, or broke off; the message is one line for the user."""


def httpx() -> ModuleType:
    """The module, or an ImportError that says where it comes from."""
    try:
        import httpx as module
    except ModuleNotFoundError:
        raise ImportError("talking to a server needs httpx: pip install 'fastattn[server]'") from None
    return module


@dataclass(frozen=True)
class Server:
    """base_url: with or without the /v1 that OpenAI's clients put at its end. api_key: sent as a bearer token."""

    base_url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url is {self.base_url!r}, expected one such as http://127.0.0.1:8000/v1")

    @property
    def root(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1")

    def url(self, path: str) -> str:
        """The address of a route, such as /v1/models or /metrics."""
        return f"{self.root}/{path.lstrip('/')}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def models(self) -> list[str]:
        """What /v1/models lists. Raises ServerError."""
        http = httpx()
        try:
            answer = http.get(self.url("/v1/models"), headers=self.headers, timeout=10, trust_env=False)
        except http.HTTPError as error:
            raise ServerError(connection_message(self, error)) from error
        if answer.status_code != 200:
            raise ServerError(error_message(answer.status_code, answer.content))
        try:
            return [str(model["id"]) for model in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise ServerError(f"{self.url('/v1/models')} answers, but not as OpenAI's API does") from None

    def choose_model(self, wish: str | None) -> str:
        """The wish, or the first model that the server lists."""
        if wish is not None:
            return wish
        names = self.models()
        if not names:
            raise ServerError(f"{self.root} lists no model: name one with --model")
        return names[0]

    def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> Generator[str, None, None]:
        """The answer to a conversation, piece by piece. Leaving early closes the connection, which ends the work.

        options: further fields of the request, those that are None left out. Raises ServerError.
        """
        http = httpx()
        body = {"model": model, "messages": list(messages), "stream": True}
        body |= {name: value for name, value in options.items() if value is not None}
        # A model may think for minutes before its first token; a connection is there at once or not at all.
        timeout = http.Timeout(None, connect=10)
        try:
            with (
                http.Client(timeout=timeout, trust_env=False) as client,
                client.stream("POST", self.url("/v1/chat/completions"), json=body, headers=self.headers) as answer,
            ):
                if answer.status_code != 200:
                    raise ServerError(error_message(answer.status_code, answer.read()))
                for line in answer.iter_lines():
                    data = event_data(line)
                    if data == DONE:
                        return
                    if data is not None:
                        yield text_of(parse_chunk(data))
        except http.HTTPError as error:
            raise ServerError(connection_message(self, error)) from error
        raise ServerError("the stream broke off before its end")


def event_data(line: str) -> str | None:
    """The data of a line of a server-sent event stream; None for comments, blank lines and other fields."""
    return line[5:].strip() if line.startswith("data:") else None


def parse_chunk(data: str) -> dict[str, Any]:
    """A chunk of a stream. Raises ServerError for one that reports an error, or is none."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise ServerError(f"the stream has an event that is no JSON: {data[:80]!r}") from None
    if not isinstance(chunk, dict):
        raise ServerError(f"the stream has an event that is no object: {data[:80]!r}")
    if chunk.get("error"):
        raise ServerError(_detail(chunk) or "the stream ended with an error")
    return chunk


def text_of(chunk: Mapping[str, Any]) -> str:
    """The new text of the first choice: of a chat or of a completion, reasoning included."""
    choices = chunk.get("choices") or [{}]
    delta = choices[0].get("delta") or {}
    return str(delta.get("reasoning_content") or "") + str(delta.get("content") or choices[0].get("text") or "")


def error_message(status: int, body: bytes) -> str:
    """One line from an answer that is an error, in OpenAI's shape or not."""
    try:
        detail = _detail(json.loads(body))
    except ValueError:
        detail = ""
    text = detail or " ".join(body.decode(errors="replace").split())[:200]
    return f"the server answers {status}: {text}" if text else f"the server answers {status}"


def _detail(value: object) -> str:
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return " ".join(str(error or "").split())


def connection_message(server: Server, error: Exception) -> str:
    detail = str(error) or type(error).__name__
    return f"{server.root} cannot be reached or broke off: {detail}"
