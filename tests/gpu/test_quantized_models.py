"""Quantized checkpoints on a GPU: each form is loaded, its weights put in order there, and its text is the dense model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn import LLM, SamplingParams, ops
from tests.models.quantized import FORMS, VOCAB, write

PROMPTS = [[1, 5, 9, 33, 2, 61, 17, 8, 40, 40, 3], [7], [(i * 11 + 3) % VOCAB for i in range(75)]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_text_is_that_of_the_dense_model_but_at_near_ties(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each token is fp32's best, or as near as three times the error that transformers makes with the same weights in `dtype`."""
    dense = write(tmp_path, FORMS[name])
    llm = LLM(
        str(tmp_path), device="cuda", dtype=str(dtype).removeprefix("torch."), max_model_len=128, num_kv_blocks=64,
        use_cuda_graphs=False, quiet=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    texts = [torch.tensor([o.prompt_token_ids + o.outputs[0].token_ids]) for o in found]
    with torch.no_grad():
        exact = [dense(ids).logits[0, -13:-1] for ids in texts]
        dense.to(dtype)
        plain = [dense(ids).logits[0, -13:-1].float() for ids in texts]
    for ids, right, rounded in zip(texts, exact, plain, strict=True):
        short = right.amax(1) - right.gather(1, ids[0, -12:, None])[:, 0]
        assert float(short.max()) <= 3 * float((rounded - right).abs().max()), short


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_decode_steps_in_4_bits_are_one_kernel(graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with enough rows for its CTAs; four sequences are, and eight are not."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel for all layers is for GPUs of compute capability 9.0")
    sizes = {"hidden_size": 256, "intermediate_size": 2176, "head_dim": 128, "num_attention_heads": 4}
    dense = write(tmp_path, FORMS["nvfp4"], **sizes, num_key_value_heads=2)
    llm = LLM(
        str(tmp_path), device="cuda", dtype="bfloat16", max_model_len=128, num_kv_blocks=64, use_cuda_graphs=graphs,
        quiet=True,
    )  # fmt: skip
    kinds: list[type] = []
    one_kernel = ops.decode_layers

    def spied(residual: torch.Tensor, weights: object, *args: object, **options: object) -> None:
        kinds.append(type(weights))
        one_kernel(residual, weights, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "decode_layers", spied)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    assert set(kinds) == {ops.DecoderFp4Weights}
    texts = [torch.tensor([o.prompt_token_ids + o.outputs[0].token_ids]) for o in found]
    with torch.no_grad():
        exact = [dense(ids).logits[0, -13:-1] for ids in texts]
        dense.to(torch.bfloat16)
        plain = [dense(ids).logits[0, -13:-1].float() for ids in texts]
    for ids, right, rounded in zip(texts, exact, plain, strict=True):
        short = right.amax(1) - right.gather(1, ids[0, -12:, None])[:, 0]
        assert float(short.max()) <= 3 * float((rounded - right).abs().max()), short
    kinds.clear()
    llm.generate([{"prompt_token_ids": PROMPTS[0]}] * 8, params, use_tqdm=False)
    assert not kinds
