"""What the tools cost in quality, on SmolLM2 and real text: `python -m bench.compress_quality WORK [NAME...]`.

WORK keeps the models, so that an interrupted run goes on. Each model is compared with the GGUF file that it was made from, on
the part of Python's help texts that calibration never sees. Writes bench/results/compress.json, case by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastattn.compress import (
    CalibrationOptions,
    DistillOptions,
    EvalOptions,
    PruneOptions,
    QuantizeOptions,
    distill,
    evaluate,
    prune,
    quantize,
)
from fastattn.compress.receipt import read_receipt, versions

MODEL = "smollm2"
RESULTS = Path(__file__).parent / "results" / "compress.json"
CALIBRATION = CalibrationOptions(samples=16, length=512)
JUDGED = EvalOptions(length=512, max_tokens=4096)
FOUR_BITS = ("int4", "nvfp4", "mxfp4")

CASES: dict[str, QuantizeOptions | PruneOptions | DistillOptions] = {
    "int8": QuantizeOptions(scheme="int8", calibration=CALIBRATION),
    **{f"{scheme}_nearest": QuantizeOptions(scheme=scheme, rounding="nearest") for scheme in FOUR_BITS},
    **{f"{scheme}_gptq": QuantizeOptions(scheme=scheme, calibration=CALIBRATION) for scheme in FOUR_BITS},
    "magnitude": PruneOptions("magnitude"),
    "wanda": PruneOptions("wanda", calibration=CALIBRATION),
    "sparsegpt": PruneOptions("sparsegpt", calibration=CALIBRATION),
    "layers": PruneOptions("layers", drop=6, calibration=CALIBRATION),
    "layers_distilled": DistillOptions(steps=120, max_minutes=8),
}


def make(name: str, out: Path) -> None:
    options = CASES[name]
    if isinstance(options, QuantizeOptions):
        quantize(MODEL, out, options, show_progress=True)
    elif isinstance(options, PruneOptions):
        prune(MODEL, out, options, show_progress=True)
    else:
        student = out.with_name(name.removesuffix("_distilled"))
        if not student.is_dir():
            make(student.name, student)
        distill(str(student), out, MODEL, options, show_progress=True)


def main(work: Path, names: list[str]) -> None:
    for name in names:
        out = work / name
        if not out.is_dir():
            make(name, out)
        result = evaluate(str(out), MODEL, JUDGED).as_dict()
        receipt = read_receipt(out) or {}
        record = {key: receipt[key] for key in ("method", "calibration", "training", "bytes") if key in receipt}
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
        cases = {**found["cases"], name: {**record, **result}}
        order = [case for case in CASES if case in cases]
        RESULTS.write_text(
            json.dumps({"versions": versions(), "cases": {case: cases[case] for case in order}}, indent=2) + "\n"
        )
        print(f"{name}: KL {result['kl_mean']:.4f}, perplexity {result['perplexity']:.2f}, top-1 {result['top1']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2 or set(sys.argv[2:]) - set(CASES):
        sys.exit(f"usage: python -m bench.compress_quality WORK [{' | '.join(CASES)}]...")
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
