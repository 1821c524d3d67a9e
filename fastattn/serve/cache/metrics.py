"""What the cache counts. All labels come from the code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from fastattn.serve.cache.database import Database

OUTCOMES = ("hit", "joined", "semantic", "miss", "bypass")


class CacheMetrics:
    """In a registry of their own unless one is given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.lookups = Counter(
            "fastattn:response_cache_lookups",
            "Requests by what the response cache had for them; joined: the answer was being made for another.",
            ["outcome"],
            registry=registry,
        )
        self.failures = Counter(
            "fastattn:response_cache_failures", "Times that the store failed.", ["kind"], registry=registry
        )
        self.bytes = Gauge("fastattn:response_cache_bytes", "Size of the answers that are kept.", registry=registry)
        self.damaged = Gauge(
            "fastattn:response_cache_damaged_entries", "Entries that were not what was stored.", registry=registry
        )
        self.evicted = Gauge(
            "fastattn:response_cache_evicted_entries", "Entries that made room for others.", registry=registry
        )
        for outcome in OUTCOMES:
            self.lookups.labels(outcome)

    def observe(self, database: Database) -> None:
        self.bytes.set(database.num_bytes)
        self.damaged.set(database.num_damaged)
        self.evicted.set(database.num_evicted)
