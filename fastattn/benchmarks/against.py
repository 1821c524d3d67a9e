"""`fastattn bench … --against vllm,hf`: the same requests in another engine, each in a process of its own, before ours starts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastattn.benchmarks.engines import Load, Measured, measure, missing
from fastattn.compress.hf_folder import hf_config, stores_norms_minus_one
from fastattn.compress.walk import read_weight
from fastattn.models.loader import ModelSource
from fastattn.models.loader.safetensors_source import SafetensorsSource

PEERS = {"vllm": "vllm", "hf": "transformers"}  # what a user calls it, and its package
_SHARD_BYTES = 4 << 30
_OUR_SECONDS = {  # load → the figure of our result that a peer's time is compared with
    "latency": "avg_latency",
    "throughput": "elapsed_time",
    "startup": "avg_warm_first_token_time",
}


def parse_peers(text: str | None) -> list[str]:
    """Of a list such as "vllm,hf". Raises ValueError for a name that is none of `PEERS`, ImportError for a package that is not
    there: before anything is loaded or measured."""
    names = [name.strip() for name in text.split(",")] if text is not None else []
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--against has {name!r}, allowed are {', '.join(PEERS)}")
    for name in names:
        if why := missing(PEERS[name]):
            raise ImportError(f"--against {name}: {why}", name=PEERS[name])
    return list(dict.fromkeys(names))


def measure_peers(
    names: Sequence[str],
    source: ModelSource,
    load: Load,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tensor_parallel_size: int = 1,
    max_model_len: int,
    gpu_memory_utilization: float,
) -> dict[str, Measured]:
    """What each peer makes of the load (tensor_parallel_size: vLLM), with the model's weights in ``dtype``, drawing at temperature 1 as ours does."""
    kind = str(dtype).removeprefix("torch.")
    options: dict[str, dict[str, Any]] = {
        "vllm": {
            "tensor_parallel_size": tensor_parallel_size,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
        },
        "hf": {"device": str(device)},
    }
    with hf_folder(source, dtype) as folder:
        return {
            name: measure(
                f"fastattn.benchmarks.engines:{name}",
                str(folder),
                {"dtype": kind, "temperature": 1.0, **options[name]},
                [load],
            )
            for name in names
        }


@contextmanager
def hf_folder(source: ModelSource, dtype: torch.dtype) -> Iterator[Path]:
    """The model as a folder that every engine reads: its own if it is one, else one in ``dtype`` that lives as long as this."""
    if isinstance(source, SafetensorsSource):
        yield Path(source.name)
        return
    with tempfile.TemporaryDirectory(prefix="fastattn-against-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(hf_config(source.config, dtype)))
        weight_map: dict[str, str] = {}
        for index, shard in enumerate(_shards(source, dtype)):
            name = f"model-{index:05d}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        yield folder


def _shards(source: ModelSource, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, info in source.tensors().items():
        shard[name] = torch.empty(info.shape, dtype=dtype)
        read_weight(source, name, shard[name])
        if stores_norms_minus_one(source.config) and name.endswith("norm.weight"):
            shard[name].sub_(1)
        num_bytes += shard[name].nbytes
        if num_bytes >= _SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
    if shard:
        yield shard


def beside(
    found: Mapping[str, Measured],
    load: str,
    figures: Callable[[list[float]], dict[str, Any]],
    ours: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The "against" of a result, `ours`: for each peer its version and start, the same figures, made of its seconds, and the
    ratio of its time to ours, above 1 where ours is faster; or why there are none. load: "latency", "throughput" or "startup", where
    the seconds are those from a process's start to its first token, the files being in the page cache."""
    our_seconds = ours[_OUR_SECONDS[load]]
    result: dict[str, dict[str, Any]] = {}
    for name, m in found.items():
        about: dict[str, Any] = {"version": m.version, "startup_seconds": m.startup_seconds}
        if m.error:
            result[name] = about | {"error": m.error}
            continue
        seconds = [m.startup_seconds] if load == "startup" else m.seconds[load]
        ratio = sum(seconds) / len(seconds) / our_seconds
        result[name] = about | figures(seconds) | {"ratio": ratio}
        if note := m.notes.get(load):
            result[name]["note"] = note
    return result


def lines(against: Mapping[str, Mapping[str, Any]], what: str) -> Iterator[str]:
    """A line for each peer. what: the figure to show."""
    for name, result in against.items():
        if "error" in result:
            yield f"{name}: failed: {result['error']}"
        else:
            yield f"{name} {result['version']}: {what} {result[what]:.4f}; ours is {result['ratio']:.2f} times as fast"
