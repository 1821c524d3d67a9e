"""What the host does for a step of decoding, with a device that takes no time: schedule, step buffer, tokens, outputs."""

from __future__ import annotations

from functools import partial

import torch

from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, Family
from bench.harness.ceilings import Work
from fastattn.engine.batch import Batch, Step
from fastattn.engine.config import EngineConfig
from fastattn.engine.engine import Engine
from fastattn.engine.request import Request
from fastattn.engine.runner import Computed, Runner
from fastattn.engine.sampler import Draw, Sampler
from fastattn.engine.sampling_params import OutputKind, SamplingParams
from fastattn.models.registry import build_model
from fastattn.speculative.proposer import Drafts
from tests.engine import tiny

NUM_SEQS = (1, 32, 128, 256)
MIN_PROMPT, MAX_LEN = 20, 2048


class NoDevice(Runner):
    """Fills the step's buffers, and computes nothing."""

    def __init__(self, config: EngineConfig) -> None:
        device = torch.device("cpu")
        super().__init__(build_model(tiny.CONFIG, device, torch.float32, MAX_LEN), config, device, torch.float32)
        self._logits = torch.zeros(config.max_num_seqs, 1)
        self._token_ids = (torch.arange(config.max_num_seqs) % 90 + 5).int()
        self.sampler = KnownDraws(self._token_ids)

    def compute_part(self, step: Step) -> Computed:
        self.buffers.load(step)
        if step.greedy:
            return Computed(token_ids=self._token_ids[: step.num_logits])
        return Computed(self._logits[: step.num_logits])


class KnownDraws(Sampler):
    """Draws the same token for a row in every step."""

    def __init__(self, token_ids: torch.Tensor) -> None:
        super().__init__()
        self._token_ids = token_ids

    def launch(
        self,
        logits: torch.Tensor,
        batch: Batch,
        num_drafted: dict[Request, int],
        needs: int,
        drafts: Drafts | None = None,
    ) -> Draw:
        return Draw(num_drafted, self._token_ids[: len(num_drafted)], None)


class Decoding:
    """Steps of num_seqs requests that decode; when they are at their end, new ones."""

    def __init__(self, num_seqs: int, kind: OutputKind) -> None:
        config = EngineConfig(
            max_model_len=MAX_LEN,
            num_kv_blocks=num_seqs * (MAX_LEN // 16),
            max_num_seqs=num_seqs,
            max_num_batched_tokens=8192,
            async_scheduling=True,
        )
        self.num_seqs, self.kind = num_seqs, kind
        self.engine = Engine(NoDevice(config), config, tiny.make_tokenizer())
        self._count = 0

    def start(self) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=MAX_LEN - MIN_PROMPT - 16, ignore_eos=True, output_kind=self.kind
        )
        for i in range(self.num_seqs):
            self._count += 1
            prompt = {
                "prompt_token_ids": [5 + (self._count + i + j) % 90 for j in range(MIN_PROMPT + i % 16)]
            }  # blocks fill at different steps
            self.engine.add_request(str(self._count), prompt, params)
        for _ in range(4):
            self.engine.step()

    def step(self) -> None:
        if not self.engine.has_unfinished_requests():
            self.start()
        self.engine.step()


def decoding(context: Context, num_seqs: int, kind: OutputKind) -> Case:
    load = Decoding(num_seqs, kind)

    def check() -> Checked:
        load.start()
        num_tokens = load.engine.stats().num_generated_tokens
        for _ in range(5):
            outputs = load.engine.step()
            told = [output.outputs[0].token_ids for output in outputs]
            if kind == "delta" and told != [[5 + i % 90] for i in range(num_seqs)]:
                raise WrongResultError(f"outputs have {told[:3]} …, expected what was drawn")
        if (found := load.engine.stats().num_generated_tokens - num_tokens) != 5 * num_seqs:
            raise WrongResultError(f"5 steps gave {found} tokens, expected {5 * num_seqs}")
        return Checked(0.0)

    return Case(
        load.step,
        check,
        {},
        Work(items=num_seqs, unit="tok"),
        f"{num_seqs} requests decode, block size 16, prefix cache, outputs {'streamed' if kind == 'delta' else 'at the end'}",
    )


_KINDS: dict[str, OutputKind] = {"end": "final", "streamed": "delta"}
FAMILY = Family(
    "host",
    "cpu",
    "the host's time for a step of decoding, with a device that takes none",
    tuple(
        CaseSpec(f"b{n}_{name}", partial(decoding, num_seqs=n, kind=kind), quick=n == 256)
        for name, kind in _KINDS.items()
        for n in NUM_SEQS
    ),
    timer="thread",
)
