"""The offline front: a model, prompts in, texts out. Familiar to a vLLM user."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tqdm import tqdm

from fastattn.engine.engine import Engine
from fastattn.engine.intake import Params, Prompt
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.setup import EngineOptions, build_engine
from fastattn.models.config import ModelConfig
from fastattn.models.loader import ModelSource
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import SpeculativeConfig

Message = Mapping[str, Any]


class LLM:
    """A loaded model.

    model: a name that we know ("smollm2", "gemma3-270m"), a folder in Hugging Face's layout, or a .gguf file.
    device: "auto", "cpu", "cuda", "cuda:N". dtype: "auto", "float32" (CPU), "bfloat16", "float16".
    speculative_config: a SpeculativeConfig, or a mapping of its fields; None is off.
    tensor_parallel_size: ranks that share the model, a process each, and on CUDA a GPU each.
    The other options are EngineOptions'. Raises ValueError, in one line, for what cannot work.
    """

    def __init__(
        self,
        model: str | ModelSource,
        *,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> None:
        unknown = sorted(set(options) - set(EngineOptions.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"LLM: unknown option {unknown[0]!r}, allowed are {sorted(EngineOptions.__dataclass_fields__)}"
            )
        if isinstance(speculative_config, Mapping):
            speculative_config = SpeculativeConfig.from_dict(speculative_config)
        if speculative_config is not None:
            options["speculative"] = speculative_config
        self.engine: Engine = build_engine(model, EngineOptions(**options), show_progress=not quiet)
        self._ids = itertools.count()
        self._streaming: set[str] = set()
        self._outputs: list[RequestOutput] = []  # of other streams than the one that ran the step

    def close(self) -> None:
        """Ends the other ranks of a model that is shared by several. Also done when the object is no longer used."""
        self.engine.close()

    def sleep(self, level: int = 1) -> None:
        """Gives memory back while nobody needs the model; see `Engine.sleep`."""
        self.engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes it again; see `Engine.wake_up`."""
        self.engine.wake_up(tags)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.runner.model.config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt, all together; the outputs are in the order of the prompts."""
        listed = _as_list(prompts)
        every = _as_params("sampling_params", sampling_params, len(listed), SamplingParams())
        params = [replace(p, output_kind="final") for p in every]
        return self._run(listed, params, "Requests", use_tqdm)

    def _run(self, prompts: list[Prompt], params: Sequence[Params], what: str, use_tqdm: bool) -> list[RequestOutput]:
        final: list[RequestOutput] = []
        with tqdm(total=len(prompts), desc=what, unit="req", disable=None if use_tqdm else True) as bar:
            for output in self.stream(prompts, params):
                final.append(output)
                bar.update()
        return sorted(final, key=lambda output: int(output.request_id))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """A vector for each prompt, in their order: `RequestOutput.embedding`."""
        listed = _as_list(prompts)
        params = _as_params("pooling_params", pooling_params, len(listed), PoolingParams())
        return self._run(listed, params, "Prompts", use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several, through the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self.generate([self.chat_prompt(c) for c in conversations], sampling_params, use_tqdm=use_tqdm)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """The prompt that the model's chat template makes of a conversation, as token ids. Special tokens that are spelled
        out in a message stay text."""
        return {"prompt_token_ids": self.tokenizer.chat_token_ids(messages)}

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
    ) -> Iterator[RequestOutput]:
        """Yields outputs as they come, of any prompt in any order; request ids count up in the order of the prompts.

        Leaving the loop early aborts what is not finished.
        """
        listed = _as_list(prompts)
        params = _as_params("params", params, len(listed), SamplingParams())
        ids: set[str] = set()
        try:
            for prompt, p in zip(listed, params, strict=True):
                request_id = str(next(self._ids))
                self.engine.add_request(request_id, prompt, p)
                ids.add(request_id)
                self._streaming.add(request_id)
            while ids:
                for output in self._step(ids):
                    if output.finished:
                        ids.remove(output.request_id)
                        self._streaming.remove(output.request_id)
                    yield output
        finally:
            for request_id in ids:
                self.engine.abort_request(request_id)
            self._streaming -= ids

    def _step(self, ids: set[str]) -> list[RequestOutput]:
        """Outputs of these requests. A loop over one stream may run another inside it, so each keeps what is the other's."""
        if not any(output.request_id in ids for output in self._outputs):
            self._outputs += self.engine.step()
        taken = [output for output in self._outputs if output.request_id in ids]
        self._outputs = [o for o in self._outputs if o.request_id in self._streaming and o.request_id not in ids]
        return taken


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    return [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)


P = TypeVar("P", bound=Params)


def _as_params(name: str, params: P | Sequence[P] | None, count: int, default: P) -> list[P]:
    if params is None or not isinstance(params, Sequence):
        return [default if params is None else params] * count
    if len(params) != count:
        raise ValueError(f"{name} has {len(params)} entries, expected one or {count}, as many as prompts")
    return list(params)
