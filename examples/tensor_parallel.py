"""A model cut across two ranks, with a GPU each, or on a CPU with half of the cores each. The text is that of one rank.

python examples/tensor_parallel.py [--model smollm2]
"""

import argparse

import torch

from fastattn import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
model = parser.parse_args().model

device = "cuda" if torch.cuda.device_count() > 1 else "cpu"
llm = LLM(model, device=device, tensor_parallel_size=2, max_model_len=256, quiet=True)
(output,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
print(f"two ranks on {device} say:{output.outputs[0].text}")
llm.close()  # ends the other rank; so does the end of the program
