"""From a command line to a loaded model, and from prompts to a stream of outputs."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from fastattn.engine.quick_start import quick_start

if TYPE_CHECKING:
    from fastattn.engine.engine import Engine
    from fastattn.engine.intake import Prompt
    from fastattn.engine.llm import LLM
    from fastattn.engine.outputs import RequestOutput
    from fastattn.engine.sampling_params import SamplingParams
    from fastattn.models.loader import ModelSource


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and how long that took."""

    llm: LLM
    load_seconds: float
    import_seconds: float


def open_source(model: str) -> ModelSource:
    from fastattn.models.loader import open_model

    return open_model(model)


def load_llm(model: str | ModelSource, **options: Any) -> Loaded:
    """Loads the model. Options that are None are left to the engine.

    The engine's seed, which serves requests without their own, is a new one each time: a person who asks twice at a
    temperature expects two answers.
    """
    start = time.perf_counter()
    given = {name: value for name, value in options.items() if value is not None}
    with quick_start(model if isinstance(model, str) else model.name, given.get("device", "auto")):
        from fastattn.engine.llm import LLM

        imported = time.perf_counter()
        llm = LLM(model, seed=secrets.randbits(63), **given)
    return Loaded(llm, time.perf_counter() - imported, imported - start)


def make_params(**values: Any) -> SamplingParams:
    """Sampling parameters of a request whose outputs are streamed."""
    from fastattn.engine.sampling_params import SamplingParams

    return SamplingParams(output_kind="delta", **values)


class Interrupt:
    """While in this block Ctrl-C sets ``hit``; a second one ends the program as usual.

    An exception in the middle of a step would leave the engine's bookkeeping half done; between steps it is whole, and a
    chat can go on.
    """

    def __init__(self) -> None:
        self.hit = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True


def stream(
    engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, interrupt: Interrupt
) -> Iterator[tuple[int, RequestOutput]]:
    """(index of the prompt, what is new of it), as it comes, all prompts at once. Ends early on an interrupt.

    Every prompt is checked before the first is answered; a bad one raises ValueError that says which. What is unfinished
    when this ends is aborted.
    """
    index_of: dict[str, int] = {}
    try:
        for index, prompt in enumerate(prompts):
            try:
                engine.add_request(str(index), prompt, params)
            except ValueError as error:
                which = f"prompt {index + 1}: " if len(prompts) > 1 else ""
                raise ValueError(f"{which}{str(error).removeprefix('add_request: ')}") from error
            index_of[str(index)] = index
        while index_of and not interrupt.hit:
            for output in engine.step():
                index = index_of[output.request_id]
                if output.finished:
                    del index_of[output.request_id]
                yield index, output
    finally:
        for request_id in index_of:
            engine.abort_request(request_id)
