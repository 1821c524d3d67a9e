"""The front's pool of render workers: templates and tokenizing never run in the event loop, nor without limits."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from fastattn.serve import render_worker as w
from fastattn.serve.contract import APIError
from fastattn.serve.json_body import parse_text
from fastattn.serve.messages import TokenizerParts
from fastattn.serve.protocol import Message, Tool
from fastattn.serve.tools import system_text

logger = logging.getLogger("fastattn.serve")

_WALL_SECONDS = 30.0  # for what the worker's own limits do not catch: it is killed then
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(w.Reply).decode


class _Worker:
    def __init__(self, parts: bytes) -> None:
        self._parts = parts
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, request: bytes) -> w.Reply:
        """Raises EOFError when the worker died over it, TimeoutError when it had to be killed."""
        if self._process is None or self._process.returncode is not None:
            await self._start()
        try:
            return await asyncio.wait_for(self._exchange(request), _WALL_SECONDS)
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "fastattn.serve.render_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},  # and none of the server's secrets
        )
        await self._write(self._parts)

    async def _write(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(w.LENGTH.pack(len(data)) + data)
        await self._process.stdin.drain()

    async def _exchange(self, request: bytes) -> w.Reply:
        assert self._process is not None and self._process.stdout is not None
        try:
            await self._write(request)
            head = await self._process.stdout.readexactly(w.LENGTH.size)
            return _decode(await self._process.stdout.readexactly(w.LENGTH.unpack(head)[0]))
        except ConnectionError as error:
            raise EOFError from error

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


class Renderer:
    """max_model_len bounds what is tokenized; model texts longer than 8 characters a token are looked at in part first."""

    def __init__(self, parts: TokenizerParts, max_model_len: int, num_workers: int) -> None:
        self.has_chat_template = parts.chat_template is not None
        # What a template never mentions it would drop without a word.
        self._template_words = frozenset(re.findall(r"\w+", parts.chat_template or ""))
        self._knows_tools = "tools" in (parts.chat_template or "")
        self._max_model_len = max_model_len
        data = _encode(parts)
        self._workers = [_Worker(data) for _ in range(num_workers)]
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in self._workers:
            self._idle.put_nowait(worker)

    async def start(self) -> None:
        """Starts the workers, so that the first request need not wait for one."""
        await asyncio.gather(*(self._ask(w.Decode([])) for _ in self._workers))

    async def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        reply = await self._ask(w.Encode(list(texts), add_special_tokens, self._max_model_len))
        return reply.ids

    async def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        if not self.has_chat_template:
            raise APIError(400, "this model has no chat template: it completes text, see /v1/completions")
        definitions = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        plain = [_as_template_sees(message, self._knows_tools) for message in messages]
        if definitions and not self._knows_tools:
            plain.insert(0, {"role": "system", "content": system_text(definitions)})
            if plain[1]["role"] == "system":
                plain[0]["content"] += "\n\n" + plain.pop(1)["content"]
        known = definitions if definitions and self._knows_tools else None
        more = self._known(variables or {})
        return (await self._ask(w.Chat(plain, known, add_generation_prompt, self._max_model_len, more))).ids[0]

    def _known(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables that the template uses. Raises APIError for another."""
        known, words = dict(variables), self._template_words
        if known.get("reasoning_effort") == "none" and "reasoning_effort" not in words and "enable_thinking" in words:
            del known["reasoning_effort"]
            known.setdefault("enable_thinking", False)
        for name in known:
            if name not in words:
                param = name if name == "reasoning_effort" else "chat_template_kwargs"
                raise APIError(400, f"this model's chat template knows no {name}", param=param)
        return known

    async def decode(self, tokens: Sequence[int]) -> str:
        return (await self._ask(w.Decode(list(tokens)))).texts[0]

    async def pieces(self, tokens: Sequence[int]) -> list[str]:
        return (await self._ask(w.Pieces(list(tokens)))).texts

    async def _ask(self, request: w.Request) -> w.Reply:
        try:
            data = _encode(request)
        except (OverflowError, RecursionError) as error:  # of a tool's schema, or a call's arguments
            raise APIError(400, f"the request cannot be given to the chat template: {error}") from None
        # Who leaves while all workers are busy is gone, and the request with it.
        worker = await self._idle.get()
        # Shielded: a client that leaves now must not leave half a reply in a pipe.
        reply = await asyncio.shield(asyncio.ensure_future(self._exchange(worker, data)))
        if reply.error is not None:
            raise APIError(400, reply.error)
        return reply

    async def _exchange(self, worker: _Worker, request: bytes) -> w.Reply:
        try:
            return await worker.ask(request)
        except (EOFError, asyncio.TimeoutError):
            logger.error("a render worker died over a request, or did not answer in %g s", _WALL_SECONDS)
            return w.Reply(error="this request could not be turned into tokens")
        finally:
            self._idle.put_nowait(worker)

    async def close(self) -> None:
        for worker in self._workers:
            await worker.close()


def _as_template_sees(message: Message, knows_tools: bool) -> dict[str, Any]:
    """What transformers would give a template: plain text, and arguments as objects."""
    role = "system" if message.role == "developer" else message.role
    seen: dict[str, Any] = {"role": role, "content": message.text or message.refusal or ""}
    if message.name is not None:
        seen["name"] = message.name
    if (thought := message.reasoning_content or message.reasoning) is not None:
        seen["reasoning_content"] = thought  # the name that templates know
    calls = [
        {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
        for call in message.tool_calls or ()
    ]
    if knows_tools:
        if calls:
            ids = [call.id for call in message.tool_calls or ()]
            seen["tool_calls"] = [
                {"id": i, "type": "function", "function": call} for i, call in zip(ids, calls, strict=True)
            ]
        if message.tool_call_id is not None:
            seen["tool_call_id"] = message.tool_call_id
        return seen
    parts = [seen["content"]] if seen["content"] else []
    parts += [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    seen["content"] = "\n".join(parts)
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{seen['content']}\n</tool_response>"}
    return seen


def _arguments(text: str) -> Any:
    try:
        value = parse_text(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
