"""Makes docs/page.png: the page at / of a real server, after a real answer, with some load beside it for the charts.

    python tools/screenshot.py [--out docs/page.png] [--dark]

The server has two engines of one model, one of them with speculation, a route between them, and a response cache. It needs Chromium, and fastattn[test].
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.serve.harness import Running, running  # noqa: E402

CONFIG = """\
model: smollm2
models:
  smollm2-ngram: {{model: smollm2, speculative_config: {{method: ngram, num_speculative_tokens: 4}}}}
router:
  model_list:
    - {{model_name: plain, engine: smollm2}}
    - {{model_name: guessing, engine: smollm2-ngram}}
  routes:
    auto: {{rules: [{{name: code, when: {{matches: "Python|code"}}, use: guessing}}], default: plain}}
cache: {{path: {folder}/cache.sqlite}}
"""
FIRST = "What is photosynthesis? Answer in two sentences."
SECOND = "Write a Python function that adds two numbers, and say what it does."
LOAD = ("What is gravity?", "What is a prime number?", "Name three rivers of Europe.", "What is gravity?")


def load(server: Running, stop: threading.Event) -> None:
    """A few requests at a time, some alike, until it is to stop."""
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
        for index in range(1000):
            if stop.is_set():
                return
            messages = [{"role": "user", "content": LOAD[index % len(LOAD)]}]
            body = {"model": "auto", "messages": messages, "max_tokens": 24 + index % 40, "temperature": 0}
            client.post("/v1/chat/completions", json=body).raise_for_status()


def ask(page: Page, text: str, count: int) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator(".message-actions").nth(count - 1).wait_for(timeout=300_000, state="attached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/page.png")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or sys.exit("no chromium here")
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "serve.yaml")
        config.write_text(CONFIG.format(folder=folder))
        with running("smollm2", "--config", str(config)) as server, sync_playwright() as playwright:
            loads = [threading.Thread(target=load, args=(server, stop)) for _ in range(2)]
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(
                viewport={"width": 1280, "height": 800}, color_scheme="dark" if arguments.dark else "light"
            )
            page.goto(server.url)
            page.evaluate('localStorage.setItem(\'fastattn.settings\', \'{"temperature": "0", "max_tokens": "160"}\')')
            page.reload()
            page.wait_for_selector("#model option[value=auto]", state="attached")
            page.select_option("#model", "auto")
            for thread in loads:
                thread.start()
            time.sleep(45)
            stop.set()
            ask(page, FIRST, 1)
            page.click("#new")
            ask(page, FIRST, 1)  # out of the cache
            ask(page, SECOND, 2)
            time.sleep(2.5)
            page.mouse.move(400, 300)
            page.screenshot(path=arguments.out)
            for thread in loads:
                thread.join()
            browser.close()
    print(arguments.out, arguments.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
