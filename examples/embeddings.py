"""Texts as vectors, and which of them are alike.

python examples/embeddings.py [--model smollm2]
"""

import argparse

from fastattn import LLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
llm = LLM(parser.parse_args().model, quiet=True)

question, *texts = "A cat sleeps.", "A kitten naps.", "Stocks fell sharply today."
vectors = [output.embedding for output in llm.embed([question, *texts], use_tqdm=False)]
for text, vector in zip(texts, vectors[1:], strict=True):
    likeness = sum(a * b for a, b in zip(vectors[0], vector, strict=True))  # the cosine: vectors have length 1
    print(f"{likeness:.3f}  {text}")
