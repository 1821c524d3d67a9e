"""Makes docs/page.png: the page at / of a real server, after a real answer, with some load beside it for the charts.

    python tools/screenshot.py [MODEL] [--out docs/page.png] [--config FILE]

It needs Chromium, and fastattn[test].
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from pathlib import Path

import httpx
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.serve.harness import Running, running  # noqa: E402

FIRST = "What is photosynthesis? Answer in two sentences."
SECOND = "Write a Python function that adds two numbers, and say what it does."
LOAD = ("What is gravity?", "What is a prime number?", "Name three rivers of Europe.", "What is gravity?")


def load(server: Running, name: str, stop: threading.Event) -> None:
    """A few requests at a time, some alike, until it is to stop."""
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:
        for index in range(1000):
            if stop.is_set():
                return
            messages = [{"role": "user", "content": LOAD[index % len(LOAD)]}]
            body = {"model": name, "messages": messages, "max_tokens": 16 + 8 * (index % 4), "temperature": 0}
            client.post("/v1/chat/completions", json=body).raise_for_status()


def ask(page: Page, text: str, count: int) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator(".message-actions").nth(count - 1).wait_for(timeout=300_000, state="attached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/page.png")
    parser.add_argument("--config", type=Path, help="the server's YAML file")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or sys.exit("no chromium here")
    flags = ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}']
    flags += ["--config", str(arguments.config)] if arguments.config else []
    stop = threading.Event()
    with running(arguments.model, *flags) as server, sync_playwright() as playwright:
        name = server.get("/v1/models").json()["data"][0]["id"]
        loads = [threading.Thread(target=load, args=(server, name, stop)) for _ in range(2)]
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        scheme = "dark" if arguments.dark else "light"
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
        page.goto(server.url)
        page.wait_for_selector("#status[data-state=ok]")
        page.evaluate('localStorage.setItem(\'fastattn.settings\', \'{"temperature": "0", "max_tokens": "160"}\')')
        page.reload()
        for thread in loads:
            thread.start()
        time.sleep(20)
        ask(page, FIRST, 1)
        ask(page, SECOND, 2)
        time.sleep(20)
        page.mouse.move(400, 300)
        page.screenshot(path=arguments.out)
        stop.set()
        for thread in loads:
            thread.join()
        browser.close()
    print(arguments.out, arguments.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
