"""One endpoint over two models, with a rule that chooses, and a cache that answers what was asked before.

pip install 'fastattn[server]'
python examples/router_cache.py [--model smollm2]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="smollm2", help="a name, a folder in Hugging Face's layout, or a .gguf file")
parser.add_argument("--port", type=int, default=8000)
arguments = parser.parse_args()

CONFIG = """
model: {model}
served_model_name: [first]
num_kv_blocks: 512
models:
  second: {{model: {model}, num_kv_blocks: 512}}   # another engine; here of the same model
router:
  model_list:
    - {{model_name: small, engine: first}}
    - {{model_name: large, engine: second}}
  routes:
    auto:
      rules:
        - {{name: long, when: {{min_prompt_chars: 40}}, use: large}}
      default: small
cache:
  path: {folder}/cache.sqlite
  lookup_timeout: 60   # by default a lookup that takes 0.25 s is a miss; a slow disk shall not spoil what this shows
"""

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "serve.yaml")
    file.write_text(CONFIG.format(model=arguments.model, folder=folder))
    server = subprocess.Popen(
        [sys.executable, "-m", "fastattn", "serve", "--config", str(file), "--port", str(arguments.port)]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{arguments.port}", timeout=120, trust_env=False) as client:
            while True:  # /ready answers 200 as soon as both models are loaded
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if server.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(0.2)

            for text in (
                "What is gravity?",
                "What is gravity?",
                "What is gravity, and who was the first to describe it?",
            ):
                body = {"model": "auto", "temperature": 0, "max_tokens": 12}
                start = time.perf_counter()
                answer = client.post(
                    "/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": text}]}
                )
                answer.raise_for_status()
                milliseconds = (time.perf_counter() - start) * 1e3
                model, route, cache = (
                    answer.headers.get(f"x-fastattn-{name}", "-") for name in ("model", "route", "cache")
                )
                print(f"model {model}, route {route}, cache {cache}, {milliseconds:.0f} ms")
    finally:
        server.terminate()
        server.wait()
