"""What `bench latency`, `throughput` and `startup` set beside our engine, and where their result goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fastattn.cli import _session
from fastattn.cli._options import Engine

if TYPE_CHECKING:
    from fastattn.benchmarks.engines import Measured, Request
    from fastattn.models.loader import ModelSource


class Beside:
    """The options --against, --plot and --output-json. What can be wrong with them is found before anything is loaded.

    model: what our engine is to load. engine: with which flags, of which the peers get what they have too.
    """

    def __init__(
        self,
        load: str,
        model: str,
        *,
        against: str | None,
        plot: Path | None,
        output_json: Path | None,
        n: int,
        engine: Engine,
    ) -> None:
        self.model: str | ModelSource = model
        self._load, self._name, self._plot, self._output_json = load, model, plot, output_json
        self._found: dict[str, Measured] = {}
        self._engine = engine
        self._peers: list[str] = []
        if plot is not None:
            from fastattn.benchmarks.plot import require_matplotlib

            require_matplotlib()
        if against is not None:
            from fastattn.benchmarks.against import parse_peers

            self._peers = parse_peers(against)
            if n != 1:
                raise ValueError(f"--n is {n}, allowed is 1 with --against")
            if "hf" in self._peers and engine["tensor_parallel_size"] != 1:
                raise ValueError(
                    f"--tensor-parallel-size is {engine['tensor_parallel_size']}, allowed is 1 with --against hf"
                )

    def measure(self, requests: Callable[[ModelSource], list[Request]], repeats: int = 1, warm_ups: int = 0) -> None:
        """Runs the peers, if there are any: before our engine takes the memory. requests: what ours will be asked."""
        if not self._peers:
            return
        from fastattn.benchmarks.against import measure_peers
        from fastattn.benchmarks.engines import Load
        from fastattn.engine.device import choose_device, choose_dtype
        from fastattn.engine.setup import choose_model_len

        chosen = choose_device(self._engine["device"])
        self.model = source = _session.open_source(self._name)
        longest = choose_model_len(source.config, self._engine["max_model_len"])
        cut = [(ids, min(new, longest - len(ids))) for ids, new in requests(source)]  # as our engine cuts them
        self._found = measure_peers(
            self._peers,
            source,
            Load(self._load, cut, repeats, warm_ups),
            device=chosen,
            dtype=choose_dtype(self._engine["dtype"], chosen),
            tensor_parallel_size=self._engine["tensor_parallel_size"],
            max_model_len=longest,
            gpu_memory_utilization=self._engine["gpu_memory_utilization"],
        )

    def finish(self, result: dict[str, Any], figures: Callable[[list[float]], dict[str, Any]], shown: str) -> None:
        """Adds the peers to our result, shows them by the figure ``shown``, writes and draws. figures: what ours are called,
        of a peer's seconds. Exit code 1 if a peer failed."""
        if self._found:
            from fastattn.benchmarks import against

            result["against"] = against.beside(self._found, self._load, figures, result)
            for line in against.lines(result["against"], shown):
                typer.echo(line)
        _write_json(self._output_json, result)
        if self._plot is not None:
            from fastattn.benchmarks.plot import offline_section, write

            write(offline_section(self._name, result), self._plot)
        if any(m.error for m in self._found.values()):
            raise typer.Exit(1)


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
