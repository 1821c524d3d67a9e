"""A model in INT8: written to a folder, measured against the plain one, and run.

python examples/quantize.py [--model smollm2]
"""

import argparse
import tempfile
from pathlib import Path

from fastattn import LLM, SamplingParams
from fastattn.compress import CalibrationOptions, EvalOptions, QuantizeOptions, evaluate, quantize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
model = parser.parse_args().model

with tempfile.TemporaryDirectory() as folder:
    # Little text is read here, so that it takes seconds; without these options it is more.
    calibration = CalibrationOptions(samples=4, length=128)
    out = quantize(model, Path(folder, "int8"), QuantizeOptions("int8", calibration=calibration))

    result = evaluate(str(out), against=model, options=EvalOptions(length=128, max_tokens=512))
    print(f"perplexity {result.perplexity:.2f} in place of {result.against_perplexity:.2f}, KL {result.kl_mean:.4f}")

    llm = LLM(str(out), quiet=True)
    (output,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    print(f"INT8 says:{output.outputs[0].text}")
