"""What a request goes through before it is queued: tokens, limits, grammar. Touches no engine state, so any thread may do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastattn.engine.config import EngineConfig
from fastattn.engine.grammar import Grammar, GrammarCompiler
from fastattn.engine.pooling_params import PoolingParams
from fastattn.engine.sampling_params import SamplingParams
from fastattn.models.tokenizer import Tokenizer

Prompt = str | Mapping[str, object]
Params = SamplingParams | PoolingParams
TokenLists = Sequence[Sequence[int]]

# No tokenizer's tokens are longer than this on average, whatever the text: what is longer cannot fit, and is not tokenized.
MAX_BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class Prepared:
    """A request that can run. resumed: for each of the n completions the tokens that it has already. grammar: at its
    beginning; each completion takes a copy."""

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int
    resumed: list[list[int]]
    grammar: Grammar | None = None
    pooling: PoolingParams | None = None


class Intake:
    """vocab_size: the logits' width, which may exceed the tokenizer's."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._config, self._tokenizer, self._vocab_size = config, tokenizer, vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size)

    def prepare(self, prompt: Prompt, params: Params | None, resume_token_ids: TokenLists | None) -> Prepared:
        """Raises TypeError or ValueError, naming both numbers, for what can never run."""
        params = SamplingParams() if params is None else params
        if isinstance(params, PoolingParams):
            return self._prepare_pooling(prompt, params, resume_token_ids)
        if not isinstance(params, SamplingParams):
            raise TypeError(
                f"add_request: params is a {type(params).__name__}, expected SamplingParams or PoolingParams"
            )
        resumed = self._check_resumed(params.n, resume_token_ids)
        text, token_ids = self._tokenize(prompt)
        max_output = self._max_output(token_ids, params)
        wish = params.structured_output
        grammar = None if wish is None else self._grammars.compile(wish)
        return Prepared(text, token_ids, params, max_output, resumed, grammar)

    def _prepare_pooling(self, prompt: Prompt, pooling: PoolingParams, resume_token_ids: TokenLists | None) -> Prepared:
        if resume_token_ids is not None:
            raise ValueError(
                "add_request: resume_token_ids is given with PoolingParams, allowed is None: no tokens come"
            )
        if pooling.pooling == "mean" and self._config.batch_invariant:
            raise ValueError(
                "add_request: pooling is 'mean' with batch_invariant, allowed is 'last' there: a mean is summed up step by step"
            )
        text, token_ids = self._tokenize(prompt)
        self._check_length(token_ids, self._config.max_model_len, "max_model_len")
        self._check_blocks(len(token_ids), f"{len(token_ids)} prompt tokens")
        # The engine sees a greedy request for one token, which is then not taken.
        params = SamplingParams(temperature=0, max_tokens=1, output_kind="final")
        return Prepared(text, token_ids, params, 1, [[]], pooling=pooling)

    def _check_length(self, token_ids: list[int], limit: int, what: str) -> None:
        if not token_ids:
            raise ValueError("add_request: the prompt has 0 tokens, expected at least 1")
        if len(token_ids) > limit:
            raise ValueError(f"add_request: the prompt has {len(token_ids)} tokens, allowed are up to {limit}, {what}")

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            longest = self._config.max_model_len * MAX_BYTES_PER_TOKEN
            if len(prompt) > longest or len(prompt.encode("utf-8", "replace")) > longest:
                raise ValueError(
                    f"add_request: the prompt has {len(prompt)} characters, allowed are up to {longest} bytes, "
                    f"{MAX_BYTES_PER_TOKEN} for each token of max_model_len = {self._config.max_model_len}"
                )
            return prompt, self._tokenizer.encode(prompt)
        if not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt:
            raise TypeError(
                f"add_request: prompt is a {type(prompt).__name__}, expected a string or {{'prompt_token_ids': [...]}}"
            )
        return None, self._check_ids("prompt_token_ids", prompt["prompt_token_ids"])

    def _check_ids(self, name: str, ids: object) -> list[int]:
        if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
            raise TypeError(f"add_request: {name} is a {type(ids).__name__}, expected a list of integers")
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"add_request: {name} has {token!r}, allowed are integers from 0 to {self._vocab_size - 1}"
                )
        return list(ids)

    def _check_resumed(self, n: int, resume_token_ids: object) -> list[list[int]]:
        if resume_token_ids is None:
            return [[] for _ in range(n)]
        if not isinstance(resume_token_ids, Sequence) or isinstance(resume_token_ids, (str, bytes)):
            raise TypeError(
                f"add_request: resume_token_ids is a {type(resume_token_ids).__name__}, expected a list of {n} lists"
            )
        if len(resume_token_ids) != n:
            raise ValueError(f"add_request: resume_token_ids has {len(resume_token_ids)} lists, expected n = {n}")
        return [self._check_ids(f"resume_token_ids[{i}]", ids) for i, ids in enumerate(resume_token_ids)]

    def _max_output(self, token_ids: list[int], params: SamplingParams) -> int:
        """The most tokens that this request may generate; raises if it can never run."""
        limit = self._config.max_model_len
        self._check_length(token_ids, limit - 1, "max_model_len less one to generate")
        max_output = (
            limit - len(token_ids) if params.max_tokens is None else min(params.max_tokens, limit - len(token_ids))
        )
        # The last token is never written to the cache: nothing comes after it.
        self._check_blocks(
            len(token_ids) + max_output - 1, f"{len(token_ids)} prompt and up to {max_output} new tokens"
        )
        for token in [*(params.logit_bias or {}), *(params.stop_token_ids or ())]:
            if token >= self._vocab_size:
                raise ValueError(
                    f"add_request: logit_bias or stop_token_ids has {token}, "
                    f"allowed are ids from 0 to {self._vocab_size - 1}"
                )
        return max_output

    def _check_blocks(self, num_tokens: int, what: str) -> None:
        needed = -(-num_tokens // self._config.block_size)
        if needed > self._config.num_kv_blocks:
            raise ValueError(
                f"add_request: {what} need {needed} KV blocks of {self._config.block_size} tokens, "
                f"but the cache has {self._config.num_kv_blocks}"
            )
