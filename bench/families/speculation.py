"""Speculative decoding with SmolLM2, as much of it as pays, beside none and beside always the most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.families import smollm2
from bench.harness.accuracy import WrongResultError
from bench.harness.case import Case, CaseSpec, Checked, Context, Family
from bench.harness.ceilings import Work

_NEW = 96
_LIST = "one two three four, one two three four, one two three four, "
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
# A draft model as large as the target: what must not be used.
_ITSELF = {"method": "draft_model", "model": smollm2.MODEL, "num_speculative_tokens": 4}


def generation(context: Context, text: str, batch: int, spec: dict[str, Any]) -> Case:
    on_gpu = context.device.type == "cuda"
    # On a GPU requests are of mixed length and those that end are followed by others: else the slowest one's steps would be all
    # that is measured, and without speculation all would end in one step, as users' never do. Two CPU cores have no time for it.
    num_requests = 4 * batch if on_gpu else batch
    num_new = [_NEW // 2 + 37 * i % _NEW if on_gpu else _NEW for i in range(num_requests)]

    def llm(name: str, spec: dict[str, Any] | None) -> Any:
        def load() -> Any:
            from fastattn import LLM

            options: dict[str, Any] = {} if spec is None else {"speculative_config": spec}
            if on_gpu:
                options |= {"num_kv_blocks": 4096, "max_num_seqs": batch}
            return LLM(
                smollm2.MODEL,
                device=context.device.type,
                max_model_len=1024,
                enable_prefix_caching=False,
                quiet=True,
                **options,
            )

        return context.once(f"{name} {spec} {batch if on_gpu else 0}", load)

    tokenizer = llm("none", None).tokenizer
    source = _LIST * 8 if text == "list" else smollm2.TEXT
    ids = tokenizer.encode(source, add_special_tokens=False)
    listed = [(ids[(5 * i) % 40 :][: 60 + i % 5], num_new[i]) for i in range(num_requests)]

    def call(name: str, spec: dict[str, Any] | None) -> Callable[[], list[list[int]]]:
        return smollm2.our_generate(llm(name, spec), listed)

    ours, none = call("ours", spec), call("none", None)
    fixed = {**spec, "adaptive_draft_length": False}

    def check() -> Checked:
        found, expected = ours(), none()
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        # In 16 bits a step of another shape may round another way, and then every later token may differ.
        if [len(a) for a in found] != num_new or (not on_gpu and same < num_requests):
            raise WrongResultError(f"{same} of {num_requests} texts are those without speculation")
        return Checked(0.0)

    return Case(
        ours,
        check,
        {"none": lambda: none, "fixed_4": lambda: call("fixed", fixed)},
        Work(items=sum(num_new), unit="tok"),
        f"SmolLM2-135M, {num_requests} request(s), {batch} at a time, of about 60 prompt ({text}) and "
        f"{sum(num_new) / num_requests:.0f} new tokens, greedy, {spec['method']}",
        0.95,
    )


def _specs(batches: tuple[int, ...]) -> tuple[CaseSpec, ...]:
    def spec(text: str, batch: int, config: dict[str, Any], name: str) -> CaseSpec:
        return CaseSpec(f"{name}_{text}_b{batch}", lambda c: generation(c, text, batch, config), quick=batch == 1)

    ngram = [spec(text, batch, _NGRAM, "ngram") for text in ("list", "prose") for batch in batches]
    return (*ngram, *(spec("prose", batch, _ITSELF, "draft_itself") for batch in batches[:2]))


_ABOUT = "speculative decoding beside none, and beside a fixed number of guesses"
CPU = Family("speculation_cpu", "cpu", _ABOUT, _specs((1, 8, 32)), timer="wall", rounds=3)
GPU = Family("speculation_gpu", "cuda", _ABOUT, _specs((1, 8, 64, 256)), timer="wall", rounds=3)
