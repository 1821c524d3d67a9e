"""SmolLM2-135M-Instruct in our engine and in Hugging Face transformers, with the same prompts and lengths."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.harness.accuracy import WrongResultError
from bench.harness.case import Context
from bench.harness.peers import require

MODEL = "smollm2"
TEXT = (
    "The lighthouse keeper wrote in his diary every evening, whether or not anything had happened. He noted the wind, the "
    "height of the waves, the ships that passed and the flags they flew. On quiet days he described the birds: the "
    "cormorants that dried their wings on the lower rocks, the gulls that followed the fishing boats home, and once, in "
    "late October, a tired owl that slept for two days beneath the stairs. When the supply boat came it brought flour, "
    "lamp oil, letters and newspapers that were already three weeks old. He read them slowly, one a day, in the order in "
    "which they had been printed, so that the news reached him at the pace at which it had happened. In winter the boat "
    "could not land, and the keeper lived on what he had stored. He repaired the shutters, cleaned the great lens, and "
    "taught himself to play the violin from a book whose last pages were missing. Nobody on the mainland knew how each "
    "melody was supposed to end, he liked to say, because he had composed every ending himself. Years later, when the "
    "light was made automatic, his diaries were found in a chest by the door, forty volumes in all, and a historian who "
    "studied the storms of that coast discovered that no other record was as complete, as exact, or as pleasant to read."
)

Request = tuple[list[int], int]  # prompt token ids, new tokens


def requests(context: Context, tokenizer: Any, lengths: Sequence[tuple[int, int]]) -> list[Request]:
    """Prompts of given lengths, each a different piece of the text, and how many tokens to generate."""
    ids = context.once("text", lambda: tokenizer.encode(TEXT, add_special_tokens=False))
    ring = ids * (2 + max(prompt for prompt, _ in lengths) // len(ids))
    return [(ring[(17 * i) % len(ids) :][:prompt], new) for i, (prompt, new) in enumerate(lengths)]


def our_llm(context: Context, **options: Any) -> Any:
    """Without the prefix cache: a benchmark repeats its prompts, users don't."""

    def load() -> Any:
        from fastattn import LLM

        return LLM(MODEL, device=context.device.type, enable_prefix_caching=False, quiet=True, **options)

    return context.once("llm", load)


def our_generate(llm: Any, listed: Sequence[Request]) -> Callable[[], list[list[int]]]:
    from fastattn import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids, _ in listed]
    params = [SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True) for _, new in listed]

    def call() -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    return call


def hf_from_gguf() -> Any:
    """The model as transformers loads it from the same file, in fp32."""
    transformers = require("transformers")
    require("gguf")
    from fastattn.models.loader.hub import fetch

    path = fetch(MODEL)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    return _ready(model)


def hf_from_ours(device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model with the weights as our loader reads them: in a second, where the GGUF path takes half a minute."""
    transformers = require("transformers")
    from fastattn.models.loader import open_model

    source = open_model(MODEL)
    c = source.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in source.tensors():
            if name in parameters:
                source.read(name, parameters.pop(name))
    if parameters:
        raise WrongResultError(
            f"{MODEL}: transformers' {sorted(parameters)[0]} and {len(parameters) - 1} more were not in the file"
        )
    return _ready(model)


def _ready(model: Any) -> Any:
    transformers = require("transformers")
    # No end token: like ours, it shall give exactly as many tokens as it is asked for.
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


def hf_generate(model: Any, listed: Sequence[Request], together: bool) -> Callable[[], list[list[int]]]:
    """transformers' `generate`: all requests as one left-padded batch that runs until the longest is done, or one by one."""
    device = model.device

    @torch.inference_mode()
    def run(batch: Sequence[Request]) -> list[list[int]]:
        width = max(len(ids) for ids, _ in batch)
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in batch], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch], device=device)
        out = model.generate(padded, attention_mask=mask, max_new_tokens=max(new for _, new in batch))
        return [row[:new] for row, (_, new) in zip(out[:, width:].tolist(), batch, strict=True)]

    if together:
        return lambda: run(listed)
    return lambda: [tokens for request in listed for tokens in run([request])]


def check_equal(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Raises WrongResultError at the first token that differs."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise WrongResultError(f"request {i}: token {at} is {a[at : at + 1]}, transformers gives {b[at : at + 1]}")


@torch.inference_mode()
def check_near(model32: Any, model16: Any, listed: Sequence[Request], ours: list[list[int]]) -> float:
    """Greedy tokens of 16-bit arithmetic: each must be as good as the best one, but for the error of the logits.

    The 2× rule for a choice: two logits of ours may each be wrong by twice what transformers' are in the same dtype. Returns
    the largest distance from the best logit as a share of that.
    """
    worst = 0.0
    for i, ((prompt, new), tokens) in enumerate(zip(listed, ours, strict=True)):
        if len(tokens) != new:
            raise WrongResultError(f"request {i}: {len(tokens)} tokens, expected {new}")
        ids = torch.tensor([prompt + tokens], device=model32.device)
        exact = model32(ids).logits[0, len(prompt) - 1 : -1].float()
        plain = model16(ids).logits[0, len(prompt) - 1 : -1].float()
        allowed = 4 * float((plain - exact).abs().max())
        chosen = exact.gather(1, torch.tensor(tokens, device=exact.device).unsqueeze(1)).squeeze(1)
        short = exact.amax(1) - chosen
        if float(short.max()) > allowed:
            at = int(short.argmax())
            raise WrongResultError(
                f"request {i}: token {at} is {tokens[at]}, {float(short[at]):.3f} below the best logit ({int(exact[at].argmax())}), "
                f"allowed {allowed:.3f}"
            )
        worst = max(worst, float(short.max()) / allowed)
    return worst
