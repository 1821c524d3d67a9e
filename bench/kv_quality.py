"""What a KV cache of 8 bits costs in quality, on SmolLM2 and real text: `python -m bench.kv_quality [CASE...]`.

A case is a kv_cache_dtype, with a scale for each token's head, or "static-" and one, with a scale for each KV head that the first
window gives. The model is compared with itself, its cache in its own dtype, on the part of Python's help texts that `fastattn eval` takes.
Writes bench/results/kv_quality.json, case by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastattn.compress import EvalOptions, evaluate
from fastattn.compress.receipt import versions

MODEL = "smollm2"
RESULTS = Path(__file__).parent / "results" / "kv_quality.json"
CASES = {
    "fp8": ("fp8", "dynamic"),
    "int8": ("int8", "dynamic"),
    "static-fp8": ("fp8", "calculate"),
    "static-int8": ("int8", "calculate"),
}


def main(names: list[str]) -> None:
    for name in names:
        dtype, scales = CASES[name]
        options = EvalOptions(length=512, max_tokens=4096, kv_cache_dtype=dtype, kv_cache_scales=scales)
        result = evaluate(MODEL, MODEL, options).as_dict()
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
        cases = {**found["cases"], name: result}
        order = [case for case in CASES if case in cases]
        RESULTS.write_text(
            json.dumps({"versions": versions(), "cases": {case: cases[case] for case in order}}, indent=2) + "\n"
        )
        change = 100 * (result["perplexity"] / result["against_perplexity"] - 1)
        print(f"{name}: perplexity {change:+.2f} %, KL {result['kl_mean']:.5f}, top-1 {result['top1']:.3f}")


if __name__ == "__main__":
    if set(sys.argv[1:]) - set(CASES):
        sys.exit(f"usage: python -m bench.kv_quality [{' | '.join(CASES)}]...")
    main(sys.argv[1:] or list(CASES))
