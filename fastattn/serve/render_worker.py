"""A process that turns conversations and texts into token ids: `python -m fastattn.serve.render_worker`.

Chat templates are programs that come with a model. The sandbox keeps them from reaching anything; that they end, and stay
small, is kept here: 2 s of CPU time, 256 MiB, and what is killed is this process, which holds no secret and no request
but the one that it works on. Requests and replies are msgpack with a length in front, on stdin and stdout.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

import msgspec

from fastattn.models.chat_template import ChatTemplateError
from fastattn.models.tokenizer import Tokenizer
from fastattn.serve.messages import TokenizerParts

CPU_SECONDS = 2.0
_MEMORY_BYTES = 256 << 20


class Encode(msgspec.Struct, tag="encode"):
    """max_bytes: longer texts are refused unless they have fewer than max_tokens tokens so far."""

    texts: list[str]
    add_special_tokens: bool
    max_tokens: int


class Chat(msgspec.Struct, tag="chat"):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    max_tokens: int
    variables: dict[str, Any]  # further ones of the template


class Decode(msgspec.Struct, tag="decode"):
    tokens: list[int]


class Pieces(msgspec.Struct, tag="pieces"):
    """The text of each token by itself."""

    tokens: list[int]


class Reply(msgspec.Struct):
    """error: what was wrong with the request, if anything was."""

    ids: list[list[int]] = []
    texts: list[str] = []
    error: str | None = None


Request = Encode | Chat | Decode | Pieces

LENGTH = struct.Struct("<I")


def answer(tokenizer: Tokenizer, request: Request) -> Reply:
    if isinstance(request, Decode):
        return Reply(texts=[tokenizer.decode(request.tokens, skip_special_tokens=False)])
    if isinstance(request, Pieces):
        return Reply(texts=[tokenizer.token_text(token) for token in request.tokens])
    if isinstance(request, Encode):
        return Reply(ids=[_encode(tokenizer, request, text) for text in request.texts])
    # Those that a request brings are no names of ours: the configuration sees to it.
    variables = {**request.variables, "tools": request.tools}
    text = tokenizer.render_chat(request.messages, request.add_generation_prompt, **variables)
    _check_length(tokenizer, text, request.max_tokens)
    return Reply(ids=[tokenizer.encode_chat(text)])


def _encode(tokenizer: Tokenizer, request: Encode, text: str) -> list[int]:
    _check_length(tokenizer, text, request.max_tokens)
    return tokenizer.encode(text, add_special_tokens=request.add_special_tokens)


def _check_length(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    """Refuses a text that is surely too long after tokenizing no more of it than could fit."""
    head = 8 * max_tokens
    if len(text) > head and (count := len(tokenizer.encode(text[:head], add_special_tokens=False))) > max_tokens:
        raise ValueError(f"the prompt has more than {count} tokens, allowed are {max_tokens}")


def _limit() -> None:
    """From here on this process gets so much more memory, and an exception when a request takes too long."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY_BYTES, size + _MEMORY_BYTES))

    def too_long(*_: object) -> NoReturn:
        raise TimeoutError

    signal.signal(signal.SIGPROF, too_long)


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    return stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    first = _read(stdin)
    if first is None:
        return
    tokenizer = Tokenizer.from_parts(**msgspec.structs.asdict(msgspec.msgpack.decode(first, type=TokenizerParts)))
    _limit()
    decoder, encoder = msgspec.msgpack.Decoder[Request](Request), msgspec.msgpack.Encoder()
    while (data := _read(stdin)) is not None:
        reply = Reply(error=f"the chat template took more than {CPU_SECONDS:g} s")
        with suppress(TimeoutError):
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                reply = answer(tokenizer, decoder.decode(data))
            except MemoryError:
                reply = Reply(error=f"the chat template took more than {_MEMORY_BYTES >> 20} MiB")
            except (ChatTemplateError, ValueError, OverflowError) as error:
                reply = Reply(error=str(error))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        body = encoder.encode(reply)
        stdout.write(LENGTH.pack(len(body)) + body)
        stdout.flush()


if __name__ == "__main__":
    main()
