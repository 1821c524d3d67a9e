"""What a run cost, in a few lines on stderr."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.cli._session import Loaded
    from fastattn.engine.outputs import RequestOutput


def bytes_text(count: int | float) -> str:
    """A size as people read it: 1.50 GiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass
class Tally:
    """Counts the outputs of a run as they pass by."""

    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cut: int = 0  # answers that ended at the token limit
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    errors: list[int] = field(default_factory=list)  # prompts whose logits were not numbers
    first_token_seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)  # of each request, from its first token on
    _tokens_of: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, output: RequestOutput) -> None:
        new = sum(len(completion.token_ids) for completion in output.outputs)
        self.num_tokens += new
        self._tokens_of[index] = self._tokens_of.get(index, 0) + new
        if not output.finished:
            return
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cut += sum(completion.finish_reason == "length" for completion in output.outputs)
        if any(completion.finish_reason == "error" for completion in output.outputs):
            self.errors.append(index)
        m = output.metrics
        self.num_draft_tokens += m.num_draft_tokens
        self.num_accepted_tokens += m.num_accepted_tokens
        if m.first_token_time is not None and m.finished_time is not None:
            self.first_token_seconds.append(m.first_token_time - m.arrival_time)
            more, seconds = self._tokens_of[index] - len(output.outputs), m.finished_time - m.first_token_time
            if more > 0 and seconds > 0:
                self.tokens_per_second.append(more / seconds)

    def lines(self, loaded: Loaded, num_prompts: int, seconds: float) -> list[str]:
        """The summary. seconds: from the first prompt going in to the last token coming out."""
        speed = f"{self.num_tokens / seconds:.1f} tokens/s" if seconds > 0 else "-"
        if self.tokens_per_second:
            speed += f" in all, {median(self.tokens_per_second):.1f} a request (median, after its first token)"
        cut = f", {plural(self.num_cut, 'answer')} cut at the token limit" if self.num_cut else ""
        drafts = [
            f"drafts       {self.num_accepted_tokens} of {plural(self.num_draft_tokens, 'guessed token')} were right"
        ]
        first = self.first_token_seconds
        first_text = f"{median(first):.3f} s median, {max(first):.3f} s max" if first else "-"
        return [
            f"{plural(num_prompts, 'prompt')} of {plural(self.num_prompt_tokens, 'token')}, "
            f"{plural(self.num_tokens, 'new token')} in {seconds:.2f} s, on {_where(loaded)}{cut}",
            f"speed        {speed}",
            f"first token  {first_text}",
            *(drafts if self.num_draft_tokens else []),
            f"load         {loaded.load_seconds:.2f} s, after {loaded.import_seconds:.2f} s of imports",
            f"memory       {_peak_memory(loaded)}",
        ]


def _where(loaded: Loaded) -> str:
    runner = loaded.llm.engine.runner
    dtype, kv_dtype = runner.model.embed_tokens.weight.dtype, runner.kv_memory.values.dtype
    cache = "" if kv_dtype is dtype else f", KV cache in {str(kv_dtype).removeprefix('torch.')}"
    return f"{runner.device} in {str(dtype).removeprefix('torch.')}{cache}"


def _peak_memory(loaded: Loaded) -> str:
    from fastattn.engine.host_memory import host_memory

    text = f"{bytes_text(host_memory().peak)} at most"
    device = loaded.llm.engine.runner.device
    if device.type == "cuda":
        import torch

        text += f" on the host, {bytes_text(torch.cuda.max_memory_allocated(device))} at most on the GPU"
    return text


def print_lines(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stderr)
