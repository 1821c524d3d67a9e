"""Speculative decoding: guesses of the next tokens, checked in one step. The text stays the same, token for token.

python examples/speculative.py [--model smollm2]
"""

import argparse

from fastattn import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
model = parser.parse_args().model

prompt = "red green blue, red green blue, red green blue, red"
params = SamplingParams(temperature=0, max_tokens=32)
plain = LLM(model, quiet=True)
guessing = LLM(model, quiet=True, speculative_config={"method": "ngram", "num_speculative_tokens": 4})

texts, steps = [], []
for llm in (plain, guessing):
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    texts.append(output.outputs[0].token_ids)
    steps.append(llm.engine.stats().num_steps)
assert texts[0] == texts[1]

stats = guessing.engine.stats()
print(f"the same {len(texts[0])} tokens in {steps[1]} steps in place of {steps[0]}")
print(f"{stats.num_accepted_tokens} of {stats.num_draft_tokens} guesses were right")
