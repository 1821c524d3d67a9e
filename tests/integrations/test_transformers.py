"""attn_implementation="fastattn" in transformers: the logits, gradients and text of its own sdpa and eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers comes with fastattn[compress]")
import fastattn.integrations.transformers as integration  # noqa: E402
from fastattn.models.loader import ModelFileError, open_model  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What is compared with: sdpa has neither softcap nor sinks.
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "sdpa"),
    "mistral, window 5": ("Mistral", {"sliding_window": 5, "head_dim": 16}, "sdpa"),
    "gemma 2, window 5, softcap": (
        "Gemma2",
        {"sliding_window": 5, "head_dim": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 9},
        "eager",
    ),
    "gpt-oss, window 5, sinks": (
        "GptOss",
        {"sliding_window": 5, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
        "eager",
    ),
}


def pair(name: str, seed: int = 0) -> tuple[Any, Any]:
    """(ours, theirs): one model with either attention, fp32."""
    family, options, reference = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for parameter in theirs.parameters():  # spread, so that attention matters
        parameter.data.normal_(0, 0.15)
    ours = copy.deepcopy(theirs)
    theirs.set_attn_implementation(reference)
    ours.set_attn_implementation("fastattn")
    return ours, theirs


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: list[int], side: str) -> torch.Tensor:
    longest = max(lengths)
    rows = [[0] * (longest - n) + [1] * n if side == "left" else [1] * n + [0] * (longest - n) for n in lengths]
    return torch.tensor(rows)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_logits(name: str, padding: str | None) -> None:
    ours, theirs = pair(name)
    ids = tokens(3, 19)
    mask = None if padding is None else mask_of([19, 7, 12], padding)
    with torch.no_grad():
        found, expected = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, theirs))
    kept = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name: str) -> None:
    ours, theirs = pair(name)
    ids, mask = tokens(2, 11), mask_of([11, 6], "right")
    labels = ids.masked_fill(mask == 0, -100)
    for model in (ours, theirs):
        model.train()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for (which, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if b.grad is None:
            continue
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=2e-3, msg=lambda m, which=which: f"{which}: {m}")


@pytest.mark.parametrize("name", ["llama", "mistral, window 5"])
@pytest.mark.parametrize("how", ["position_ids", "two rows", "cu_seq_lens"])
def test_packed(name: str, how: str) -> None:
    """Several sequences in a row are as each alone."""
    ours, theirs = pair(name)
    lengths = [7, 1, 9]
    parts = [tokens(1, n, seed=n) for n in lengths]
    ids, positions = torch.cat(parts, 1), torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    further: dict[str, Any] = {}
    if how == "two rows":
        ids, positions = ids.expand(2, -1), positions.expand(2, -1)
        # The other row holds sequences of other lengths.
        others = [tokens(1, n, seed=n + 50) for n in (3, 14)]
        ids, positions = ids.clone(), positions.clone()
        ids[1], positions[1] = torch.cat(others, 1)[0], torch.cat([torch.arange(3), torch.arange(14)])
    elif how == "cu_seq_lens":
        cu = torch.tensor([0, 7, 8, 17])
        further = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": torch.tensor(9), "max_length_k": 9}
    with torch.no_grad():
        found = ours(input_ids=ids, position_ids=positions, use_cache=False, **further).logits
        rows = [parts, others] if how == "two rows" else [parts]
        expected = torch.cat([torch.cat([theirs(input_ids=part).logits for part in row], 1) for row in rows])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate(name: str, cache: str, padded: bool) -> None:
    ours, theirs = pair(name)
    ids = tokens(2, 6)
    mask = mask_of([6, 3], "left") if padded else torch.ones_like(ids)
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    found, expected = (model.generate(ids, attention_mask=mask, **options) for model in (ours, theirs))
    assert found.tolist() == expected.tolist()


def test_several_new_tokens_on_a_cache() -> None:
    """As when a prompt comes in chunks: more than one query, and keys from before."""
    ours, theirs = pair("llama")
    ids, mask = tokens(2, 9), mask_of([9, 5], "left")
    logits = []
    for model in (ours, theirs):
        with torch.no_grad():
            first = model(input_ids=ids[:, :6], attention_mask=mask[:, :6])
            logits.append(
                model(input_ids=ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values).logits
            )
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)


def test_encoder_and_cross_attention() -> None:
    """Not causal, and keys that are another's: all queries see all tokens of the padded input."""
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    theirs = transformers.BartForConditionalGeneration(config).eval()
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("fastattn")
    theirs.set_attn_implementation("sdpa")
    ids, mask, begun = tokens(3, 8), mask_of([8, 3, 5], "right"), tokens(3, 8, seed=2)
    with torch.no_grad():
        for length in (1, 5, 8):
            found, expected = (
                m(input_ids=ids, attention_mask=mask, decoder_input_ids=begun[:, :length]).logits
                for m in (ours, theirs)
            )
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_whole_masks_go_to_torch_and_say_so() -> None:
    ours, theirs = pair("llama")
    ids = tokens(1, 6)
    mask = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.3
    mask |= torch.eye(6, dtype=torch.bool)
    with torch.no_grad(), pytest.warns(UserWarning, match="whole attention_mask"):
        found = ours(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        torch.testing.assert_close(found, theirs(input_ids=ids, attention_mask=mask).logits, atol=2e-4, rtol=1e-4)


def test_fp32_states_are_cast_to_the_layers_dtype() -> None:
    ours, _ = pair("llama")
    layer = ours.bfloat16().model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    out, weights = integration.attention_forward(layer, q, k, k.bfloat16(), None)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 5, 4, 16) and weights is None
    with torch.autocast("cpu", dtype=torch.float16):
        assert integration.attention_forward(layer, q, k, k, None)[0].dtype == torch.float16


def test_dropout_is_refused_by_name() -> None:
    ours, _ = pair("llama")
    ours.train()
    ours.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match=r"attention_dropout.*dropout_p is 0\.1"):
        ours(input_ids=tokens(1, 4))


def test_compiled_without_a_graph_break() -> None:
    ours, _ = pair("llama")
    ids = tokens(2, 8)
    compiled = torch.compile(
        lambda ids: ours(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    expected = ours(input_ids=ids, use_cache=False).logits
    found = compiled(ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()


def test_continuous_batching() -> None:
    """transformers' generate_batch says what generate says; on the CPU its cache is read by index."""
    for name in ("llama", "mistral, window 5"):
        ours, theirs = pair(name)
        prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 3)]
        options = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected = [
            theirs.generate(torch.tensor([p]), generation_config=options)[0, len(p) :].tolist() for p in prompts
        ]
        ours.set_attn_implementation("fastattn_flash_2")
        batching = transformers.ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64)
        outputs = ours.generate_batch(prompts, generation_config=options, continuous_batching_config=batching)
        found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
        assert [found[tuple(prompt)] for prompt in prompts] == expected


def test_a_step_of_decoding_on_pages() -> None:
    """Continuous batching on a GPU: one new token of each sequence, appended to its pages and attended to."""
    from tests.integrations.reference import attention

    ours, _ = pair("llama")
    layer, lengths = ours.model.layers[0].self_attn, [3, 6]
    keys, values = torch.randn(2, 2, 7, 2, 16)
    k_cache, v_cache = torch.zeros(2, 8, 4, 2, 16)
    table = torch.tensor([[5, 2], [0, 7]], dtype=torch.int32)
    for b, length in enumerate(lengths):
        for place in range(length):
            page = table[b, place // 4]
            k_cache[page, place % 4], v_cache[page, place % 4] = keys[b, place], values[b, place]
    new = [torch.stack([t[b, n] for b, n in enumerate(lengths)]) for t in (keys, values)]  # (B, Hk, D)
    q, sinks = torch.randn(2, 4, 16), torch.randn(4)
    out, _ = integration.attention_forward(
        layer, *(t.transpose(0, 1).unsqueeze(0) for t in (q, *new)), None, sliding_window=5, s_aux=sinks,
        cu_seq_lens_q=torch.arange(3), cu_seq_lens_k=torch.tensor([0, 4, 11], dtype=torch.int32), max_length_q=1,
        max_length_k=1, block_table=table, k_cache=k_cache, v_cache=v_cache,
    )  # fmt: skip
    expected, _ = attention(
        q.unsqueeze(1), keys, values, causal=True, window=(4, 0), sinks=sinks, lengths_k=torch.tensor([4, 7])
    )
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(k_cache[7, 2], keys[1, 6]) and torch.equal(v_cache[5, 3], values[0, 3])


def test_names() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    names = ("fastattn", "paged|fastattn", "fastattn_flash_2")
    assert all(name in AttentionInterface().valid_keys() for name in names)
    masks = AttentionMaskInterface()
    assert masks["fastattn"] is integration.attention_mask and masks["fastattn_flash_2"] is integration.attention_mask


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    from tests.engine.exact import hf_model

    try:
        source = open_model("smollm2")
    except ModelFileError as error:
        pytest.skip(f"smollm2 cannot be had here: {error}")
    return hf_model(source), source.tokenizer()


def test_smollm2_says_the_same(smollm2: tuple[Any, Any]) -> None:
    """The real model: greedy text of a padded batch, and logits."""
    model, tokenizer = smollm2
    rows = [tokenizer.encode(prompt) for prompt in ("The capital of France is", "Plants turn light and water into")]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    texts, logits = [], []
    for implementation in ("sdpa", "fastattn"):
        model.set_attn_implementation(implementation)
        batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
        texts.append(batch.tolist())
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits[mask.bool()])
    assert texts[0] == texts[1]
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=1e-3)
