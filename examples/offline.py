"""Prompts in, texts out: several at once, as a stream, and as a conversation.

python examples/offline.py [--model smollm2]
"""

import argparse

from fastattn import LLM, SamplingParams

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
llm = LLM(parser.parse_args().model, quiet=True)

# All prompts share every pass over the weights, so eight take little longer than one.
prompts = [f"The capital of {country} is" for country in ("France", "Italy", "Japan", "Egypt")]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False):
    print(f"{output.prompt}|{output.outputs[0].text}")

# A stream gives each piece as soon as it is there.
for output in llm.stream(
    "Once upon a time", SamplingParams(temperature=0.8, seed=7, max_tokens=24, output_kind="delta")
):
    print(output.outputs[0].text, end="", flush=True)
print()

# A conversation goes through the model's chat template; the prefix cache keeps its earlier turns.
conversation = [{"role": "user", "content": "What is 2 + 2?"}]
answer = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)[0].outputs[0].text
conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And plus 3?"}]
(output,) = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
print(f"{answer} … {output.outputs[0].text} ({output.num_cached_tokens} tokens were in the cache)")
