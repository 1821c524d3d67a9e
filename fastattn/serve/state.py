"""What a running server consists of, for its routes to ask."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from fastattn.serve import messages as m
from fastattn.serve.auth import Keys
from fastattn.serve.config import EngineSettings, ServeConfig
from fastattn.serve.contract import APIError, Backend
from fastattn.serve.engine_backend import EngineBackend
from fastattn.serve.engine_client import EngineClient, EngineTimes
from fastattn.serve.metrics import EngineMetrics, Metrics
from fastattn.serve.rate_limits import RateLimits
from fastattn.serve.renderer import Renderer


class LocalEngine(EngineBackend):
    """An engine of this server with its renderer, once it is ready."""

    def __init__(self, client: EngineClient, info: m.Ready, renderer: Renderer, metrics: EngineMetrics) -> None:
        super().__init__(client, renderer, metrics)
        self.client, self.info, self.renderer = client, info, renderer


@dataclass
class ServerState:
    config: ServeConfig
    keys: Keys
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    clients: dict[str, EngineClient] = field(default_factory=dict)
    engines: dict[str, LocalEngine] = field(default_factory=dict)  # by name, those that have become ready
    chain: Backend | None = None  # what answers, once all engines are ready

    def __post_init__(self) -> None:
        refused = self.metrics.rejections.labels("rate_limit").inc
        self.limits = RateLimits(self.config.requests_per_minute, self.config.tokens_per_minute, refused)
        for name, settings in self.engine_settings().items():
            times = EngineTimes(step=self.config.engine_timeout, health=self.config.health_timeout)
            self.clients[name] = EngineClient(
                name, settings.model, settings.engine_options(), self.metrics, times, self.config.max_num_waiting
            )

    def engine_settings(self) -> dict[str, EngineSettings]:
        return {self.config.names[0]: self.config, **self.config.models}

    def names(self) -> list[str]:
        """What requests may name: where there is a router, it decides."""
        if self.config.router is not None:
            return self.config.router.public_names
        return list(dict.fromkeys([*self.config.names, *self.config.models]))

    @property
    def rule_headers(self) -> Collection[str]:
        """Request headers that rules of the router look at."""
        return self.config.router.header_names if self.config.router is not None else ()

    def find_engine(self, name: str | None) -> LocalEngine | None:
        """The engine that a name stands for, and for nothing else; None if there is none, or not yet."""
        return self.engines.get(self._engine_name(name) or "")

    def _engine_name(self, name: str | None) -> str | None:
        if name is None:
            return self.config.names[0]
        if self.config.router is not None:
            return self.config.router.engine_of(name)
        return self.config.names[0] if name in self.config.names else name

    def engine(self, name: str | None) -> LocalEngine:
        """The engine of this name. Raises APIError: 404 for what is not served here, 400 for a name of the router that
        stands for more, 503 while it loads."""
        found = self.find_engine(name)
        if found is not None:
            return found
        self._check_alive()
        if self._engine_name(name) in self.clients:
            raise _loading()
        shown = repr((name or "")[:200])
        if name in self.names():
            text = (
                f"the model {shown} is no engine of this server alone: it completes text and conversations, and no more"
            )
            raise APIError(400, text, param="model", code="model_not_supported")
        text = f"the model {shown} is not served here, see /v1/models"
        raise APIError(404, text, "not_found_error", param="model", code="model_not_found")

    def backend(self) -> Backend:
        if self.chain is None:
            self._check_alive()
            raise _loading()
        return self.chain

    def sick(self) -> str | None:
        """What is wrong with an engine, if anything."""
        for name, client in self.clients.items():
            if not client.healthy:
                return f"engine {name!r} is {client.state}, last sign of life {client.seconds_since_sign:.1f} s ago"
        return None

    def not_ready(self) -> str | None:
        if self.chain is None:
            return "the model is still loading"
        return next((f"engine {n!r} is {c.condition}" for n, c in self.clients.items() if c.condition != "ready"), None)

    def sleepers(self, name: str | None) -> list[EngineClient]:
        """The engines that may be put to sleep: that of this name, or all. Raises APIError."""
        if name is not None:
            name = self._engine_name(name) or name
        settings = self.engine_settings()
        found = [self.clients[n] for n, s in settings.items() if s.enable_sleep_mode and name in (None, n)]
        if not found:
            whose = "" if name is None else f" of {name[:200]!r}"
            text = f"no engine{whose} may be put to sleep: see --enable-sleep-mode"
            raise APIError(404, text, "not_found_error", code="sleep_mode_off")
        return found

    def _check_alive(self) -> None:
        for client in self.clients.values():
            if client.failure is not None:
                raise APIError(503, client.failure[0], "server_error")


def _loading() -> APIError:
    return APIError(503, "the model is still loading", "overloaded_error", headers={"Retry-After": "5"})
