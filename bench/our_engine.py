"""Our engine with random weights, as `fastattn.benchmarks.engines` starts it in a process of its own. Imports no torch before that:
the start is that of our programs, which all begin with `quick_start`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn.benchmarks.engines import Running, check_lengths
from fastattn.engine.quick_start import quick_start


def ours(model: str, options: Mapping[str, Any]) -> Running:
    """model: a folder with a config.json."""
    with quick_start(model, options["device"]):
        import fastattn
        from bench.random_model import RandomSource
        from fastattn.models.config import config_from_hf

        source = RandomSource(config_from_hf(json.loads(Path(model, "config.json").read_text())))
        llm = fastattn.LLM(source, quiet=True, enable_prefix_caching=False, **options)

    def generate(listed: Any) -> tuple[float, str]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in listed]
        params = [fastattn.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True) for _, new in listed]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        check_lengths([len(output.outputs[0].token_ids) for output in outputs], listed)
        return seconds, ""

    return Running(fastattn.__version__, generate)
