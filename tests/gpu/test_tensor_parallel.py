"""Two GPUs share SmolLM2 in bf16 over NCCL: the text is that of one but at near ties, with graphs and without, and a rank that
is killed is named."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import pytest
import torch

from fastattn import LLM, SamplingParams
from fastattn.engine.ranks import RankError
from fastattn.models.loader import ModelFileError, open_model
from tests.engine.exact import hf_model
from tests.engine.prompts import PROMPTS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "device": "cuda", "dtype": "bfloat16", "max_model_len": 2048, "num_kv_blocks": 4096, "quiet": True,
}  # fmt: skip
Texts = list[tuple[list[int], list[int]]]  # (prompt, output) token ids


@pytest.fixture(autouse=True)
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices, two are needed")
    try:
        open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")


def generate(llm: LLM, prompts: list[str]) -> tuple[Texts, float]:
    """Texts, and tokens a second; the first round records graphs and is not timed."""
    llm.generate(prompts, GREEDY, use_tqdm=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    seconds = time.perf_counter() - start
    return [(o.prompt_token_ids, o.outputs[0].token_ids) for o in outputs], len(prompts) * NUM_TOKENS / seconds


@torch.inference_mode()
def check_near_ties(texts: Texts) -> int:
    """Each token is fp32's best, or so near that the rounding of bf16 decides: by at most four times the error that
    transformers' logits have in bf16 (as in test_model). Returns how many were not the best."""
    exact_model, plain_model = hf_model(open_model("smollm2")).cuda(), hf_model(open_model("smollm2")).cuda().bfloat16()
    num_ties = 0
    for prompt, tokens in texts:
        ids = torch.tensor([prompt + tokens], device="cuda")
        exact, plain = (
            m(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() for m in (exact_model, plain_model)
        )
        chosen = exact.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        short, allowed = exact.amax(1) - chosen, 4 * float((plain - exact).abs().max())
        assert float(short.max()) <= allowed, (
            f"a token is {float(short.max()):.3f} below fp32's best, allowed {allowed:.3f}"
        )
        num_ties += int((short > 0).sum())
    return num_ties


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_two_gpus_give_the_text_of_one(graphs: bool) -> None:
    figures = []
    for count in (1, len(PROMPTS)):
        prompts = PROMPTS[:count]
        one = LLM("smollm2", use_cuda_graphs=graphs, **OPTIONS)
        alone, alone_speed = generate(one, prompts)
        del one
        llm = LLM("smollm2", tensor_parallel_size=2, use_cuda_graphs=graphs, **OPTIONS)
        try:
            shared, speed = generate(llm, prompts)
        finally:
            llm.close()
        equal = sum(a == b for a, b in zip(shared, alone, strict=True))
        figures.append(
            f"{count} requests: {speed:.0f} tokens/s on two, {alone_speed:.0f} on one; {equal} of {count} texts equal, "
            f"{check_near_ties(shared)} near ties of {count * NUM_TOKENS} tokens"
        )
    warnings.warn(
        f"{torch.cuda.get_device_name()}, {'graphs' if graphs else 'eager'}: {'; '.join(figures)}", stacklevel=2
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_lost_rank_is_named(how: signal.Signals) -> None:
    """While rank 0 waits for a stream that waits for the other GPU."""
    llm = LLM("smollm2", tensor_parallel_size=2, rank_timeout_seconds=10, **OPTIONS)
    ranks = llm.engine.runner.ranks
    assert ranks is not None
    outputs = llm.stream(PROMPTS[:8], SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True))
    assert not any(next(outputs).finished for _ in range(80))
    os.kill(ranks.members[0].pid, how)
    lost = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 \(process {ranks.members[0].pid}\)"):
        list(outputs)
    assert time.monotonic() - lost < (5 if how is signal.SIGKILL else 15)
