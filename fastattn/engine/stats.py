"""What an engine has done, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.engine.engine import Engine


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the state right now.

    num_drafts: times that guesses of a request were verified; num_draft_tokens: how many in all; num_accepted_tokens: how many
    of them were right; num_accepted_tokens_per_pos: how often the first, second, … guess was. num_host_hit_tokens: those of the
    prefix hits that came back from host memory; num_bytes_to_host, num_bytes_from_host: copied, by all ranks together.
    """

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_kv_blocks: int
    num_usable_kv_blocks: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    num_host_kv_blocks: int = 0
    num_used_host_kv_blocks: int = 0
    num_host_hit_tokens: int = 0
    num_bytes_to_host: int = 0
    num_bytes_from_host: int = 0


def collect_stats(engine: Engine) -> EngineStats:
    speculator = engine.speculator
    accepted = tuple(speculator.num_accepted_per_position) if speculator is not None else ()
    block_bytes = engine.runner.kv_block_bytes
    return EngineStats(
        num_running=len(engine.scheduler.running),
        num_waiting=engine.scheduler.num_waiting,
        num_steps=engine.num_steps,
        num_preemptions=engine.scheduler.num_preemptions,
        num_prompt_tokens=engine.num_prompt_tokens,
        num_generated_tokens=engine.progress.num_generated_tokens,
        num_prefix_queried_tokens=engine.kv.num_queried_tokens,
        num_prefix_hit_tokens=engine.kv.num_hit_tokens,
        num_kv_blocks=engine.config.num_kv_blocks,
        num_usable_kv_blocks=engine.kv.num_usable_blocks,
        num_drafts=speculator.num_drafts if speculator is not None else 0,
        num_draft_tokens=speculator.num_draft_tokens if speculator is not None else 0,
        num_accepted_tokens=sum(accepted),
        num_accepted_tokens_per_pos=accepted,
        num_host_kv_blocks=engine.config.num_host_kv_blocks,
        num_used_host_kv_blocks=engine.kv.host.num_used if engine.kv.host is not None else 0,
        num_host_hit_tokens=engine.kv.num_host_hit_tokens,
        num_bytes_to_host=engine.kv.num_blocks_to_host * block_bytes,
        num_bytes_from_host=engine.kv.num_blocks_from_host * block_bytes,
    )
