"""What tests ask of the tiny engine, and a model of which one step fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fastattn import ops
from fastattn.engine.engine import Engine
from fastattn.engine.outputs import CompletionOutput, RequestOutput
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.decoder import DecoderModel, Sampling

MakeEngine = Callable[..., Engine]
Alone = Callable[[str], list[CompletionOutput]]
PROMPTS = [
    "the quick brown fox",
    "a",
    "0 1 2 3 4 5 6 7 8 9 and so on, and so on, and so on",
    "What is 00?",
    "the the the",
]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(temperature=1, seed=7, max_tokens=40, ignore_eos=True)
PARAMS = {"greedy": GREEDY, "drawn": DRAWN}


def only(output: RequestOutput) -> CompletionOutput:
    (completion,) = output.outputs
    return completion


def with_(params: SamplingParams, **changes: Any) -> SamplingParams:
    return dataclasses.replace(params, **changes)


class Faulty:
    """A model whose forward pass or logits go wrong in one step."""

    def __init__(
        self, network: DecoderModel, bad_step: int, fault: BaseException | None = None, bad_row: int = 1
    ) -> None:
        self.network, self.config, self.bad_step, self.fault = network, network.config, bad_step, fault
        self.num_steps, self.tp, self.bad_row = 0, network.tp, bad_row

    def __call__(self, *args: Any) -> torch.Tensor:
        self.num_steps += 1
        if self.fault is not None and self.num_steps == self.bad_step:
            raise self.fault
        hidden: torch.Tensor = self.network(*args)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.network.logits(hidden)
        if self.fault is None and self.num_steps == self.bad_step:
            logits[self.bad_row] = float("nan")
        return logits

    def greedy(self, hidden: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        return ops.sample(self.logits(hidden), *sampling)
