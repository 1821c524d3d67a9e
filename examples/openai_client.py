"""A server, and the openai package talking to it: a stream, two answers with log-probabilities, a tool call.

pip install 'fastattn[server]' openai
python examples/openai_client.py [--model smollm2]
"""

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
parser.add_argument("--port", type=int, default=8000)
arguments = parser.parse_args()
url = f"http://127.0.0.1:{arguments.port}"

command = [sys.executable, "-m", "fastattn", "serve", arguments.model, "--port", str(arguments.port)]
server = subprocess.Popen([*command, "--served-model-name", "example"])
try:
    while True:  # /ready answers 200 as soon as the model is loaded
        try:
            urllib.request.urlopen(f"{url}/ready")
            break
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.2)

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    question = [{"role": "user", "content": "What is the capital of France?"}]

    for chunk in client.chat.completions.create(
        model="example", messages=question, temperature=0, max_tokens=16, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    answer = client.chat.completions.create(
        model="example", messages=question, max_tokens=4, n=2, seed=1, logprobs=True, top_logprobs=2
    )
    for choice in answer.choices:
        tokens = choice.logprobs.content
        print(choice.index, [(token.token, round(token.logprob, 2)) for token in tokens])
    print(answer.usage.total_tokens, "tokens")

    # "required" holds the answer to the function's schema, so what is not cut by max_tokens parses.
    city = {"enum": ["Paris", "Rome"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="example",
        messages=[{"role": "user", "content": "Sun in Rome?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": schema}}],
        tool_choice="required",
        temperature=0,
    )
    call = answer.choices[0].message.tool_calls[0].function
    print(f"the model calls {call.name}({call.arguments})")
finally:
    server.terminate()  # it finishes what it has begun, then ends
    server.wait()
