"""Answers that are valid by construction: each token is drawn among those that the form allows.

pip install 'fastattn[server]'
python examples/structured_output.py [--model smollm2]
"""

import argparse
import json
import re

from fastattn import LLM, SamplingParams, StructuredOutput

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
llm = LLM(parser.parse_args().model, quiet=True)

schema = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Tokyo"]}, "capital": {"type": "boolean"}},
    "required": ["city", "capital"],
    "additionalProperties": False,
}
question = [{"role": "user", "content": "Describe the capital of France as JSON."}]
forms = [
    StructuredOutput("json_schema", json.dumps(schema)),
    StructuredOutput("regex", r"\d{4}-\d{2}-\d{2}"),
    StructuredOutput("choice", ("yes", "no", "perhaps")),
]
params = [SamplingParams(temperature=0, max_tokens=64, structured_output=form) for form in forms]
outputs = llm.chat([question] * len(forms), params, use_tqdm=False)  # three forms, one batch
texts = [output.outputs[0].text for output in outputs]
for form, text in zip(forms, texts, strict=True):
    print(f"{form.kind}: {text}")

assert json.loads(texts[0])["city"] in ("Paris", "Rome", "Tokyo")
assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", texts[1])
assert texts[2] in ("yes", "no", "perhaps")
