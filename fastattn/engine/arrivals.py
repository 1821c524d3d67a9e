"""From a prepared prompt to the requests that compute it."""

from __future__ import annotations

import hashlib
import time

from fastattn._runtime import TokenSequence
from fastattn.engine.config import EngineConfig
from fastattn.engine.intake import Prepared
from fastattn.engine.outputs import RequestMetrics
from fastattn.engine.request import Request


class Arrivals:
    """Counts who comes: what has no seed of its own gets one from the engine's and its place in that order."""

    def __init__(self, config: EngineConfig, eos_token_ids: tuple[int, ...]) -> None:
        self._config, self._eos_token_ids = config, eos_token_ids
        self._num_arrivals = 0

    def make_requests(self, request_id: str, prepared: Prepared, priority: int, tenant: str) -> list[Request]:
        params = prepared.params
        metrics = RequestMetrics(arrival_time=time.monotonic())
        arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        stop_token_ids = frozenset(
            [*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos_token_ids)]
        )
        shares_prompt = self._config.enable_prefix_caching and params.prompt_logprobs is None
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    request_id=request_id,
                    index=index,
                    params=params,
                    num_prompt_tokens=len(prepared.token_ids),
                    max_output_tokens=prepared.max_output_tokens,
                    seq=TokenSequence(prepared.token_ids),
                    seed=self._seed(params.seed, arrival, index),
                    arrival=arrival,
                    priority=priority if self._config.policy == "priority" else 0,
                    salt=tenant.encode("utf-8", "surrogatepass"),
                    stop_token_ids=stop_token_ids,
                    metrics=metrics,
                    after=requests[0] if requests and shares_prompt else None,
                    pooling=prepared.pooling,
                    grammar=prepared.grammar and prepared.grammar.copy(),
                )
            )
        return requests

    def _seed(self, seed: int | None, arrival: int, index: int) -> int:
        """A 64-bit seed: the user's own (each further completion counts on from it), or one from the engine's seed."""
        if seed is None:
            digest = hashlib.blake2b(f"{self._config.seed}:{arrival}".encode(), digest_size=8).digest()
            seed = int.from_bytes(digest, "little", signed=True)
        return (seed + index + 2**63) % 2**64 - 2**63
