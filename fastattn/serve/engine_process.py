"""The engine process: `python -m fastattn.serve.engine_process`, started by the front with an EngineSpec on stdin.

One thread: messages, a step, what is new, and again. It ends when it is told to, or when stdin ends, which is when the
front is gone. Signals are the front's business: a terminal or a service manager sends them to every process of a server.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from fastattn import __version__
from fastattn.engine.quick_start import quick_start
from fastattn.serve import messages as m

if TYPE_CHECKING:
    from fastattn.engine.engine import Engine
    from fastattn.engine.intake import Prepared
    from fastattn.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from fastattn.engine.sampling_params import SamplingParams

logger = logging.getLogger("fastattn.serve")

_PREPARE_SECONDS = 0.002  # between looks at what is being prepared, when there is nothing else to do


class EngineLoop:
    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], heartbeat: float) -> None:
        self._engine, self._socket, self._heartbeat = engine, socket, heartbeat
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(m.ToEngine)
        self._next_beat = 0.0
        # Grammars are compiled beside the loop. An abort takes a request out of `_preparing`; what is ready comes back
        # through the queue.
        self._pool = ThreadPoolExecutor(1, "fastattn-prepare")
        self._preparing: set[str] = set()
        self._prepared: SimpleQueue[tuple[m.Generate, Future[Prepared]]] = SimpleQueue()
        self._stopped = False

    def run(self) -> None:
        while not self._stopped:
            self._receive()
            outputs = self._engine.step()
            if outputs:
                self.send(m.Outputs([self._output(output) for output in outputs]))
            if (now := time.monotonic()) >= self._next_beat:
                self._next_beat = now + self._heartbeat
                self._engine.check()  # a lost rank is noticed in idleness too; the front starts a new engine then
                values = dataclasses.asdict(self._engine.stats())
                numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
                self.send(m.Stats(numbers))

    def send(self, message: m.FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def _receive(self) -> None:
        """Takes all messages that are there; with nothing to do it waits for one, or for the next sign of life."""
        timeout = 0.0 if self._engine.has_unfinished_requests() else max(0.0, self._next_beat - time.monotonic())
        if self._preparing:
            timeout = min(timeout, _PREPARE_SECONDS)
        while not self._stopped and self._socket.poll(math.ceil(timeout * 1000)):
            timeout = 0.0
            try:
                message = self._decoder.decode(self._socket.recv())
            except msgspec.DecodeError as error:  # not from our front
                logger.warning("a message that makes no sense is dropped: %s", error)
                continue
            self._obey(message)
        while not self._prepared.empty():
            message, future = self._prepared.get_nowait()
            if message.id in self._preparing:
                self._preparing.remove(message.id)
                self._answer_refusal(message, partial(self._queue, message, future))

    def _obey(self, message: m.ToEngine) -> None:
        if isinstance(message, m.Stop):
            self._stopped = True
        elif isinstance(message, m.Abort):
            self._preparing.discard(message.id)
            self._engine.abort_request(message.id)
        elif isinstance(message, m.Sleep):
            self._switch(partial(self._engine.sleep, message.level))
        elif isinstance(message, m.WakeUp):
            self._switch(partial(self._engine.wake_up, message.tags))
        else:
            self._answer_refusal(message, partial(self._add, message))

    def _switch(self, change: Callable[[], None]) -> None:
        """Falls asleep or wakes up; who cannot, for want of memory or of a file, stays as it was."""
        import torch

        error = None
        try:
            change()
        except torch.AcceleratorError:
            raise
        except (RuntimeError, ValueError, OSError, MemoryError) as failure:
            logger.exception("the engine could not fall asleep or wake up")
            error = " ".join(str(failure).split()) or type(failure).__name__
        self.send(m.Switched(list(self._engine.asleep), error))

    def _answer_refusal(self, message: m.Generate | m.Embed, add: Callable[[], None]) -> None:
        from fastattn.engine.engine import EngineBusyError

        try:
            add()
        except EngineBusyError as error:
            self.send(m.Refused(message.id, "busy", str(error)))
        except (ValueError, TypeError, ImportError) as error:
            self.send(m.Refused(message.id, "invalid", str(error).removeprefix("add_request: ")))

    def _add(self, message: m.Generate | m.Embed) -> None:
        prompt = {"prompt_token_ids": message.prompt_token_ids}
        if isinstance(message, m.Embed):
            from fastattn.engine.pooling_params import PoolingParams

            pooling = PoolingParams()
            self._engine.add_request(message.id, prompt, pooling, priority=message.priority, tenant=message.tenant)
            return
        params = _params(message.sampling)
        if message.sampling.structured_output is not None:
            self._preparing.add(message.id)
            future = self._pool.submit(self._engine.prepare, prompt, params, message.resume)
            future.add_done_callback(lambda done: self._prepared.put((message, done)))
            return
        self._engine.add_request(
            message.id,
            prompt,
            params,
            priority=message.priority,
            tenant=message.tenant,
            resume_token_ids=message.resume,
        )

    def _queue(self, message: m.Generate, future: Future[Prepared]) -> None:
        try:
            prepared = future.result()
        except (ValueError, TypeError, ImportError):
            raise
        except Exception as error:  # no memory for the sandbox, say; the engine has not been touched, and others go on
            logger.exception("a request could not be prepared")
            self.send(m.Refused(message.id, "busy", f"the request cannot be prepared now: {type(error).__name__}"))
            return
        self._engine.add_prepared(message.id, prepared, priority=message.priority, tenant=message.tenant)

    def _output(self, output: RequestOutput) -> m.Output:
        metrics = output.metrics
        started = metrics.first_scheduled_time
        return m.Output(
            id=output.request_id,
            choices=[self._choice(completion) for completion in output.outputs],
            finished=output.finished,
            num_cached_tokens=output.num_cached_tokens,
            queue_seconds=0.0 if started is None else started - metrics.arrival_time,
            prompt_logprobs=self._prompt_logprobs(output),
            embedding=output.embedding,
        )

    def _choice(self, completion: CompletionOutput) -> m.Choice:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = [
                self._logprobs(row, token)
                for row, token in zip(completion.logprobs, completion.token_ids, strict=False)
            ]
        return m.Choice(
            completion.index,
            completion.text,
            completion.token_ids,
            logprobs,
            completion.finish_reason,
            completion.stop_reason,
        )

    def _prompt_logprobs(self, output: RequestOutput) -> list[list[m.TokenLogprob]] | None:
        """The first token of a prompt has no probability: its rank is 0."""
        if output.prompt_logprobs is None:
            return None
        tokenizer = self._engine.tokenizer
        return [
            self._logprobs(row, token)
            if row is not None
            else [m.TokenLogprob(token, 0.0, 0, tokenizer.token_text(token), tokenizer.token_bytes(token))]
            for row, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        ]

    def _logprobs(self, row: dict[int, Logprob], chosen: int) -> list[m.TokenLogprob]:
        """The chosen token first, then by rank."""
        order = [chosen, *sorted((t for t in row if t != chosen), key=lambda t: row[t].rank)]
        tokenizer = self._engine.tokenizer
        return [
            m.TokenLogprob(t, row[t].logprob, row[t].rank, row[t].decoded_token, tokenizer.token_bytes(t))
            for t in order
        ]


def _params(sampling: m.Sampling) -> SamplingParams:
    from fastattn.engine.sampling_params import SamplingParams

    values: dict[str, Any] = msgspec.structs.asdict(sampling)
    values.pop("structured_output")
    if (wish := sampling.structured_output) is not None:
        from fastattn.engine.structured_output import StructuredOutput

        value = tuple(wish.value) if isinstance(wish.value, list) else wish.value
        values["structured_output"] = StructuredOutput(wish.kind, value)
    return SamplingParams(output_kind="delta", **values)


def _exit_with_the_front() -> None:
    """Waits for the end of stdin in a thread of its own, so that nothing is left behind by a front that was killed."""

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin: its lock would be held at the interpreter's end
            pass
        os._exit(0)

    threading.Thread(target=wait, name="fastattn-front-watch", daemon=True).start()


def _build(spec: m.EngineSpec) -> tuple[Engine, str]:
    """The engine, and the digest of what decides about its answers."""
    from fastattn.engine.setup import EngineOptions, build_engine
    from fastattn.models.loader import open_model
    from fastattn.speculative.config import SpeculativeConfig

    options = dict(spec.options)
    if (speculative := options.pop("speculative", None)) is not None:
        options["speculative"] = SpeculativeConfig.from_dict(speculative)
    source = open_model(spec.model)
    decisive = {name: value for name, value in spec.options.items() if name != "trace"}
    digest = _digest(Path(source.name), {"version": __version__, **decisive})
    return build_engine(source, EngineOptions(**options)), digest


def _digest(path: Path, options: dict[str, Any]) -> str:
    """Of a model's files by name, size and time, which is quick for any size, and of how it is run."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(msgspec.json.encode([stats, options])).hexdigest()


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=m.EngineSpec)
    _exit_with_the_front()
    from fastattn import config

    logging.basicConfig(level=config.log_level(), format="%(levelname)s %(name)s: %(message)s")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, spec.identity.encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.set_hwm(0)  # what is in flight is bounded by the requests that the front admits
    socket.connect(spec.address)
    encode = msgspec.msgpack.encode
    try:
        with quick_start(spec.model, spec.options.get("device") or "auto"):
            engine, digest = _build(spec)
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        socket.send(encode(m.StartFailed(" ".join(str(error).split()) or type(error).__name__, 2)))
        context.destroy()
        return 2
    sizes = engine.config
    socket.send(
        encode(
            m.Ready(
                model=spec.model,
                device=str(engine.runner.device),
                max_model_len=sizes.max_model_len,
                vocab_size=engine.runner.model.config.vocab_size,
                max_num_seqs=sizes.max_num_seqs,
                digest=digest,
                tokenizer=m.TokenizerParts(**engine.tokenizer.parts()),
            )
        )
    )
    try:
        EngineLoop(engine, socket, spec.heartbeat).run()
    finally:
        engine.close()
    context.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
