"""Grammars in the engine: compiled once, a state per completion, a mask of allowed tokens per step. By llguidance."""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastattn.engine.structured_output import COMPILE_LIMITS, StructuredOutput
from fastattn.models.tokenizer import Tokenizer
from fastattn.sandbox import Sandbox, SandboxError

COMPILE_CPU_SECONDS = 1.0  # and again as much here
COMPILE_MEMORY_BYTES = 1 << 30
CACHE_BYTES = 16 << 20  # of the texts that were compiled; what they become is of that order
DEAD_END = "there is no token that can go on as the grammar wants it"
_STACK_BYTES = 64 << 20


def import_llguidance() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise ImportError("structured output needs llguidance: pip install 'fastattn[server]'") from None


class Grammar:
    """How far one completion has come in its grammar. Not for several threads at a time."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy())

    def accept(self, token_id: int) -> None:
        """Goes on by one token; if that cannot be, `error` says why from then on."""
        self._matcher.consume_token(token_id)

    def num_valid(self, token_ids: Sequence[int]) -> int:
        """How many of these, from the first, could follow. Changes nothing."""
        return int(self._matcher.validate_tokens(list(token_ids)))

    def rollback(self, num_tokens: int) -> None:
        """Takes the last tokens back."""
        self._matcher.rollback(num_tokens)

    @property
    def accepting(self) -> bool:
        """The text so far is complete, whether or not more can follow."""
        return bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """The text is complete and nothing can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Why this grammar can go no further, though its text is not complete."""
        if not self._matcher.is_error():
            return None
        message = str(self._matcher.get_error()).split("\n")[0]
        return DEAD_END if message.startswith("NoExtension") else message


class GrammarCompiler:
    """From `StructuredOutput` to `Grammar`, for one tokenizer; any thread may call.

    A grammar comes from a stranger, and compiling it may take for ever, all memory, or the process. So it is compiled in a
    sandbox first, under limits and with a small stack; only one that passes is compiled here, with a large one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: the logits' width; tokens past the tokenizer's are never allowed."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._sandbox = Sandbox("fastattn.engine.grammar_sandbox", COMPILE_CPU_SECONDS, COMPILE_MEMORY_BYTES)
        self._lock = threading.Lock()
        self._bridge: Any = None
        self._cache: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._cache_bytes = 0

    def compile(self, wish: StructuredOutput) -> Grammar:
        """A grammar at its beginning. Raises ValueError if it is none, or too much."""
        with self._lock:
            if wish in self._cache:
                self._cache.move_to_end(wish)
                return self._cache[wish].copy()
        llguidance = import_llguidance()
        lark = wish.to_lark()
        try:
            self._sandbox.run(lark)
        except SandboxError as error:
            raise _refusal(wish, str(error)) from None
        grammar = Grammar(_with_large_stack(lambda: self._match(llguidance, lark)))
        if grammar.error is not None:
            raise _refusal(wish, grammar.error)
        self._remember(wish, grammar)
        return grammar.copy()

    def _match(self, llguidance: Any, lark: str) -> Any:
        with self._lock:
            if self._bridge is None:
                self._bridge = llguidance.LLTokenizer(
                    self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=list(self._tokenizer.eos_token_ids)
                )
        grammar = llguidance.LLMatcher.grammar_from_lark(lark)
        matcher = llguidance.LLMatcher(
            self._bridge, grammar, limits=llguidance.LLParserLimits(**COMPILE_LIMITS), log_level=0
        )
        if not matcher.is_error():
            # The first mask is the costliest; a grammar that it is too much for is refused here, to its owner.
            mask = torch.empty(-(-self._vocab_size // 32), dtype=torch.int32)
            matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        return matcher

    def _remember(self, wish: StructuredOutput, grammar: Grammar) -> None:
        with self._lock:
            if wish in self._cache:
                return
            self._cache[wish] = grammar
            self._cache_bytes += wish.num_bytes
            while self._cache_bytes > CACHE_BYTES:
                dropped, _ = self._cache.popitem(last=False)
                self._cache_bytes -= dropped.num_bytes


def _refusal(wish: StructuredOutput, problem: str) -> ValueError:
    if wish.kind != "grammar":  # a place in what we made of it
        problem = re.sub(r"^at \d+\(\d+\): ", "", problem)
    return ValueError(f"structured_output: this {wish.kind} cannot be used: {problem}")


class GrammarMasks:
    """Masks of a step, in `ops.apply_token_bitmask`'s layout, computed side by side without Python's lock."""

    def __init__(self) -> None:
        self._executor: Any = None

    def fill(self, wanted: Sequence[tuple[Grammar, Sequence[int]]], vocab_size: int, pin: bool) -> torch.Tensor:
        """(rows, ⌈vocab_size / 32⌉) int32 on the host: for each grammar the mask of its next token, and then that after
        each of its drafts. After a draft that the grammar does not take, what the masks are is left open."""
        num_rows = sum(1 + len(drafts) for _, drafts in wanted)
        masks = torch.zeros((num_rows, -(-vocab_size // 32)), dtype=torch.int32, pin_memory=pin)
        if self._executor is None:
            self._executor = import_llguidance().LLExecutor(min(8, os.cpu_count() or 1))
        plain, drafted, row = [], [], 0
        for grammar, drafts in wanted:
            if drafts:
                drafted.append((grammar._matcher, row, list(drafts)))
            else:
                plain.append((grammar._matcher, row))
            row += 1 + len(drafts)
        memory = (masks.data_ptr(), masks.shape[1] * masks.itemsize, num_rows)
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *memory)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *memory)
        return masks


def _with_large_stack(call: Callable[[], Any]) -> Any:
    """Runs a call in a thread whose stack is large enough for what passed the sandbox's small one."""
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="fastattn-grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


_STACK_LOCK = threading.Lock()  # the size is the process's, and is set for the start of one thread
