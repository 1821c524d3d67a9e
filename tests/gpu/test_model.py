"""SmolLM2 in bf16 on the GPU beside transformers: logits within the 2× rule, greedy text equal but at near ties."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastattn.models.llama as llama
from fastattn import LLM, SamplingParams, ops
from fastattn.engine.device import device_memory
from fastattn.engine.memory_plan import memory_plan
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.setup import EngineOptions, plan_options
from fastattn.models.loader import ModelFileError, open_model
from fastattn.nn import split_gate_up
from tests.engine.exact import hf_model
from tests.engine.prompts import PROMPTS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def llm() -> LLM:
    try:
        open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    return LLM("smollm2", device="cuda", dtype="bfloat16", max_model_len=2048, num_kv_blocks=4096, quiet=True)


@pytest.fixture(scope="module")
def judges() -> tuple[Any, Any]:
    """transformers' model in fp32, and as anyone would run it in bf16."""
    source = open_model("smollm2")
    return hf_model(source).cuda(), hf_model(source).cuda().bfloat16()


@torch.inference_mode()
def logits_of(judge: Any, token_ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = judge(torch.tensor([token_ids], device="cuda"), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def our_logits(llm: LLM, token_ids: list[int]) -> torch.Tensor:
    """(T, vocab_size) of one prefill, by the runner's own path."""
    from fastattn._runtime import TokenSequence

    runner = llm.engine.runner
    blocks = llm.engine.kv.pool.allocate(-(-len(token_ids) // runner.config.block_size))
    assert blocks is not None
    sequence = TokenSequence(token_ids)
    sequence.add_blocks(blocks)
    try:
        step = replace(runner.buffers.fill([sequence], [len(token_ids)]), extra_rows=((0, len(token_ids)),))
        return runner.compute(step).extra_logits[0]
    finally:
        llm.engine.kv.pool.release(blocks)


def test_the_plan_is_what_is_taken() -> None:
    """Weights, cache and buffers to a percent of what the allocator holds for them; a widest step takes no more than was planned."""
    wishes: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 2048, "num_kv_blocks": 4096}
    options, device = EngineOptions(**wishes), torch.device("cuda")
    try:
        source = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had: {error}")
    sizes = plan_options(source.config, options, device, torch.bfloat16)
    plan = memory_plan(source.config, source.tensors(), sizes, *device_memory(device))
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = LLM(source, quiet=True, **wishes)
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    assert held == pytest.approx(plan.weights_total + plan.kv_bytes + plan.buffer_bytes, rel=0.01)
    prompts = [{"prompt_token_ids": [i % 1000 + 2] * 32} for i in range(sizes.max_num_seqs)]
    made.generate(prompts, SamplingParams(temperature=0.8, max_tokens=4, ignore_eos=True), use_tqdm=False)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= plan.total_bytes
    made.close()


def test_gates_ups_and_activation_are_one_product(llm: LLM) -> None:
    """Loaded so, each rank's rows in turns; the layer gives what product and activation give one after the other, and no worse."""
    layers = [layer.mlp.gate_up_proj for layer in llm.engine.runner.model.layers]
    assert all(layer.interleaved for layer in layers)
    x = torch.randn(3, layers[0].in_features, device="cuda", dtype=torch.bfloat16)
    gate, up = (w.double() for w in split_gate_up(layers[0].weight))
    exact = torch.nn.functional.silu(x.double() @ gate.t()) * (x.double() @ up.t())
    plain = ops.swiglu(ops.linear(x, torch.cat((gate, up)).bfloat16()))
    error, allowed = ((y.double() - exact).abs().max() for y in (layers[0](x), plain))
    assert float(error) <= 2 * float(allowed)


@pytest.mark.parametrize("many", [4096, 65], ids=["separate norms", "norms inside"])
def test_logits_hold_the_2x_rule(llm: LLM, judges: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    """Over all positions of all prompts, and of all together: the largest error, and the mean. many: rows from which on products
    normalize."""
    monkeypatch.setattr(llama, "_MANY_ROWS", many)
    exact_model, plain_model = judges
    ours, plain = [], []
    for prompt in (*PROMPTS, " ".join(PROMPTS)):
        ids = llm.tokenizer.encode(prompt)[:2000]
        exact = logits_of(exact_model, ids)
        ours.append((our_logits(llm, ids) - exact).abs())
        plain.append((logits_of(plain_model, ids) - exact).abs())
    our_error, plain_error = torch.cat(ours), torch.cat(plain)
    figures = f"largest {float(our_error.max()):.3f} and {float(plain_error.max()):.3f} for transformers, "
    figures += f"mean {float(our_error.mean()):.4f} and {float(plain_error.mean()):.4f}"
    assert float(our_error.max()) <= 2 * float(plain_error.max()), figures
    assert float(our_error.mean()) <= 2 * float(plain_error.mean()), figures
    warnings.warn(f"errors of bf16 logits: {figures}", stacklevel=2)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_greedy_text_is_that_of_fp32_but_at_near_ties(llm: LLM, judges: tuple[Any, Any], graphs: bool) -> None:
    """Each token is the best one in fp32, or so near to it that the rounding of bf16 decides; those are shown.

    Two logits of ours may each be wrong by twice what transformers' are in bf16, so the distance may be four times that.
    """
    runner = llm.engine.runner
    kept, runner.graphs = runner.graphs, runner.graphs if graphs else None
    try:
        prompts = [{"prompt_token_ids": llm.tokenizer.encode(prompt)} for prompt in PROMPTS]
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    finally:
        runner.graphs = kept
    hold_to_fp32(outputs, judges)


def hold_to_fp32(outputs: list[RequestOutput], judges: tuple[Any, Any]) -> None:
    num_ties, num_equal, widest = 0, 0, 0.0
    for index, output in enumerate(outputs):
        prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
        assert len(tokens) == NUM_TOKENS
        exact = logits_of(judges[0], prompt + tokens)[len(prompt) - 1 : -1]
        plain = logits_of(judges[1], prompt + tokens)[len(prompt) - 1 : -1]
        chosen = exact.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        short = exact.amax(1) - chosen
        allowed = 4 * float((plain - exact).abs().max())
        for position in (short > 0).nonzero()[:, 0].tolist():
            gap = float(short[position])
            best = int(exact[position].argmax())
            where = f"prompt {index}, token {position}: ours {tokens[position]}, fp32 {best}, {gap:.3f} higher"
            assert gap <= allowed, f"{where}, allowed {allowed:.3f}"
            num_ties, widest = num_ties + 1, max(widest, gap)
        num_equal += bool((short <= 0).all())
    warnings.warn(
        f"{num_equal} of {len(outputs)} texts are fp32's; {num_ties} of {len(outputs) * NUM_TOKENS} tokens were near ties, "
        f"the widest {widest:.3f}",
        stacklevel=2,
    )


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_what_all_begin_with_is_read_once(
    llm: LLM, judges: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """Decode steps with a shared prefix of 37 blocks, as a cascade: held to fp32 as all greedy text is."""
    runner, levels = llm.engine.runner, []
    plain = ops.cascade_attention

    def counted(*args: Any, **options: Any) -> Any:
        levels.append(args[3][1].seqused_k.shape[0])
        return plain(*args, **options)

    monkeypatch.setattr(ops, "cascade_attention", counted)
    monkeypatch.setattr(runner, "_cascade_keys", 1)
    monkeypatch.setattr(runner, "graphs", runner.graphs if graphs else None)
    shared = llm.tokenizer.encode(" ".join(PROMPTS))[:600]
    prompts = [{"prompt_token_ids": shared + llm.tokenizer.encode(prompt)} for prompt in PROMPTS[:12]]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    llm.generate(prompts[:1], params, use_tqdm=False)
    hold_to_fp32(llm.generate(prompts, params, use_tqdm=False), judges)
    num_layers = llm.engine.runner.model.config.num_layers
    assert set(levels) == {16 if graphs else 12}
    assert (
        len(levels) == 2 * num_layers if graphs else len(levels) >= (NUM_TOKENS - 2) * num_layers
    )  # before and in the capture


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("kv_cache_dtype", "scales", "most"),
    [("int8", "dynamic", 0.003), ("fp8", "dynamic", 0.02), ("int8", "calculate", 0.014), ("fp8", "calculate", 0.034)],
)
def test_caches_of_8_bits(judges: tuple[Any, Any], kv_cache_dtype: str, scales: str, most: float, graphs: bool) -> None:
    """Prompts lose three times what bench/results/kv_quality.json has, at most; and tokens that are computed one by one are
    those of a prompt that has them all, but at ties as near as bf16 makes them.
    """
    options = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 2048, "num_kv_blocks": 2048, "quiet": True}
    llm = LLM("smollm2", kv_cache_dtype=kv_cache_dtype, kv_cache_scales=scales, use_cuda_graphs=graphs, **options)
    prompts = [llm.tokenizer.encode(" ".join(PROMPTS[i:] + PROMPTS[:i]))[:400] for i in range(0, len(PROMPTS), 7)]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    divergences = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        ours = our_logits(llm, prompt + tokens)
        exact, plain = (logits_of(judge, prompt + tokens) for judge in judges)
        divergences.append((exact.softmax(-1) * (exact.log_softmax(-1) - ours.log_softmax(-1))).sum(-1))
        chosen = ours[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        short = ours[len(prompt) - 1 : -1].amax(1) - chosen
        assert float(short.max()) <= float((plain - exact).abs().max()), f"token {int(short.argmax())}"
    divergence = float(torch.cat(divergences).mean())
    assert divergence <= most, f"{divergence:.4f} nats"
    warnings.warn(f"{kv_cache_dtype}, {scales}: {divergence:.5f} nats from fp32", stacklevel=2)


def test_a_seed_gives_the_same_text_again(llm: LLM) -> None:
    prompt = {"prompt_token_ids": llm.tokenizer.encode(PROMPTS[1])}
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=24, ignore_eos=True)
    first = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    again = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    assert first == again
