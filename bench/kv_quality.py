"""What a KV cache of 8 bits costs in quality, on SmolLM2 and real text: `python -m bench.kv_quality [DTYPE...]`.

The model is compared with itself, its cache in its own dtype, on the part of Python's help texts that `fastattn eval` takes.
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
DTYPES = ("fp8", "int8")


def main(names: list[str]) -> None:
    for name in names:
        result = evaluate(MODEL, MODEL, EvalOptions(length=512, max_tokens=4096, kv_cache_dtype=name)).as_dict()
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
        cases = {**found["cases"], name: result}
        order = [case for case in DTYPES if case in cases]
        RESULTS.write_text(
            json.dumps({"versions": versions(), "cases": {case: cases[case] for case in order}}, indent=2) + "\n"
        )
        change = 100 * (result["perplexity"] / result["against_perplexity"] - 1)
        print(f"{name}: perplexity {change:+.2f} %, KL {result['kl_mean']:.5f}, top-1 {result['top1']:.3f}")


if __name__ == "__main__":
    if set(sys.argv[1:]) - set(DTYPES):
        sys.exit(f"usage: python -m bench.kv_quality [{' | '.join(DTYPES)}]...")
    main(sys.argv[1:] or list(DTYPES))
