"""The process in which a stranger's grammar is compiled first. ``python -m fastattn.engine.grammar_sandbox``."""

from __future__ import annotations

import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fastattn.engine.structured_output import COMPILE_LIMITS
from fastattn.sandbox import serve

# Small: what is nested too deeply for it dies here, not in the engine, whose stack is larger.
_STACK_BYTES = 4 << 20


class Check:
    def __init__(self) -> None:
        self._tokenizer = LLTokenizer("byte")  # compiling costs the same whatever the tokens are
        self._limits = LLParserLimits(**COMPILE_LIMITS)  # type: ignore[arg-type]

    def __call__(self, lark: str) -> None:
        """Raises ValueError with llguidance's words if it cannot be compiled."""
        problems: list[str] = []
        thread = threading.Thread(target=lambda: problems.append(self._problem(lark)))
        thread.start()
        thread.join()
        if problems[0]:
            raise ValueError(problems[0][:500])

    def _problem(self, lark: str) -> str:
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(lark), limits=self._limits, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return matcher.get_error().strip().split("\n")[0]


if __name__ == "__main__":
    check = Check()
    threading.stack_size(_STACK_BYTES)
    serve(check)
