"""What the engine's `quantization` costs in quality, on SmolLM2 and real text: `python -m bench.quantization_quality WORK [FORM...]`.

WORK keeps the model in bf16, made from the GGUF file. Each form rounds those weights as they are loaded, and is compared with the model
itself, on the part of Python's help texts that `fastattn eval` takes; sums and everything between products are fp32, on a CPU.
Writes bench/results/quantization_quality.json, form by form.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastattn.compress import EvalOptions, QuantizeOptions, evaluate, quantize
from fastattn.compress.receipt import versions
from fastattn.models.weight_formats import FORMATS

MODEL = "smollm2"
RESULTS = Path(__file__).parent / "results" / "quantization_quality.json"


def main(work: Path, names: list[str]) -> None:
    plain = work / "smollm2-bf16"
    if not plain.is_dir():
        quantize(MODEL, plain, QuantizeOptions(scheme="none", dtype="bfloat16"))
    for name in names:
        options = EvalOptions(length=512, max_tokens=4096, device="cpu", quantization=name)
        result = evaluate(str(plain), str(plain), options).as_dict()
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
        cases = {**found["cases"], name: result}
        order = [case for case in FORMATS if case in cases]
        RESULTS.write_text(
            json.dumps({"versions": versions(), "cases": {case: cases[case] for case in order}}, indent=2) + "\n"
        )
        change = 100 * (result["perplexity"] / result["against_perplexity"] - 1)
        print(f"{name}: perplexity {change:+.2f} %, KL {result['kl_mean']:.5f}, top-1 {result['top1']:.3f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or set(sys.argv[2:]) - set(FORMATS):
        sys.exit(f"usage: python -m bench.quantization_quality WORK [{' | '.join(FORMATS)}]...")
    main(Path(sys.argv[1]), sys.argv[2:] or list(FORMATS))
