"""All layers of a decoder as one operator: the same as layer by layer, and errors that name what does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastattn import ops
from fastattn.ops._decode_layers_checks import check_kernel_sizes
from tests.harness.decode_layers import DecodeCall, make_call

CPU = torch.device("cpu")
SIZES = (64, 128, 4, 2, 64)


@pytest.mark.parametrize("kind", ["plain", "bias", "head_norms"])
def test_it_is_the_formula(kind: str) -> None:
    call = make_call(
        CPU, torch.float32, 3, SIZES, [1, 17, 0, 40], bias=kind == "bias", head_norms=kind == "head_norms",
        activation="gelu_tanh" if kind == "bias" else "silu",
    )  # fmt: skip
    found, k_cache, v_cache = call.run(None)
    rows = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found[rows].double(), call.exact()[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[rows], call.layer_by_layer()[rows], rtol=1e-4, atol=1e-4)
    for before, after in zip((*call.k_cache, *call.v_cache), (*k_cache, *v_cache), strict=True):
        changed = (before != after) & ~(before.isnan() & after.isnan())
        slots = changed.flatten(2).any(2).flatten().nonzero().flatten()
        assert slots.tolist() == sorted(s for s in call.rows["slot_mapping"].tolist() if s >= 0)


@pytest.mark.parametrize("order", [8, 16])
@pytest.mark.parametrize("kind", ["plain", "bias", "head_norms"])
def test_weights_in_4_bits_are_the_formula_with_the_norms_in_front(kind: str, order: int) -> None:
    call = make_call(
        CPU, torch.float32, 3, SIZES, [1, 17, 0, 40], bias=kind == "bias", head_norms=kind == "head_norms",
        activation="gelu_tanh" if kind == "bias" else "silu",
    ).in_fp4(order)  # fmt: skip
    found, _, _ = call.run(None)
    rows = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found[rows].double(), call.exact()[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[rows], call.layer_by_layer()[rows], rtol=1e-4, atol=1e-4)


def test_errors_name_what_of_4_bit_weights_does_not_fit() -> None:
    call = make_call(CPU, torch.bfloat16, 2, SIZES, [3, 5]).in_fp4(16)
    weights = call.weights
    assert isinstance(weights, ops.DecoderFp4Weights)
    out, down = weights.out, weights.down
    for changes, message in (
        ({"out": dataclasses.replace(out, codes=out.codes[:1])}, r"weights.out.codes has 1 tensors, expected 2"),
        (
            {"out": dataclasses.replace(out, scale=[t[:, :, :32] for t in out.scale])},
            r"weights.out.scale\[0\] is \(4, 4, 32\) on cpu, expected a contiguous \(4, 4, 64\) on cpu",
        ),
        (
            {"down": dataclasses.replace(down, global_scale=[t[1:] for t in down.global_scale])},
            r"weights.down.global_scale\[0\] is \(63,\) on cpu, expected a contiguous \(64,\) on cpu",
        ),
        ({"mlp_norm": weights.mlp_norm[:1]}, r"weights.mlp_norm has 1 tensors, expected 2 as k_cache"),
        ({"tile_order": 4}, r"weights.tile_order is 4, expected 16 or 8"),
        ({"tile_order": 16.0}, r"weights.tile_order is 16.0, expected 16 or 8"),
        (
            {"down": dataclasses.replace(down, codes=[t[0, 0] for t in down.codes])},
            r"weights.down.codes\[0\] has shape \(512,\), expected \(N/16, I/64, 512\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"decode_layers: {message}"):
            _changed(call, weights=dataclasses.replace(weights, **changes)).run(None)  # type: ignore[arg-type]
    norms = [t.float() for t in weights.input_norm]
    with pytest.raises(TypeError, match=r"weights.input_norm\[0\] is torch.float32, expected torch.bfloat16"):
        _changed(call, weights=dataclasses.replace(weights, input_norm=norms)).run(None)
    no_scale, one_tensor = dataclasses.replace(out, scale=None), dataclasses.replace(down, codes=down.codes[0])
    no_globals = dataclasses.replace(out, global_scale=[None, None])
    for name, wrong, message in (
        ("qkv", norms, "weights.qkv is a list, expected Fp4Tiles in DecoderFp4Weights"),
        ("down", norms, "weights.down is a list, expected Fp4Tiles in DecoderFp4Weights"),
        ("out", no_scale, "weights.out.scale is a NoneType, expected a list of tensors"),
        ("down", one_tensor, "weights.down.codes is a Tensor, expected a list of tensors"),
        ("out", no_globals, r"weights.out.global_scale\[0\] is a NoneType, expected a Tensor"),
        ("mlp_norm", [None, None], r"weights.mlp_norm\[0\] is a NoneType, expected a Tensor"),
    ):
        with pytest.raises(TypeError, match=f"decode_layers: {message}"):
            _changed(call, weights=dataclasses.replace(weights, **{name: wrong})).run(None)  # type: ignore[arg-type]


def test_a_head_is_the_embedding_in_front_and_the_logits_behind() -> None:
    call = make_call(CPU, torch.float32, 3, SIZES, [1, 17, 0, 40]).with_head(72)
    assert call.head is not None
    found, _, _ = call.run(None)
    rows = torch.tensor([0, 1, 3])
    torch.testing.assert_close(found[rows].double(), call.exact()[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call.head.logits[rows].double(), call.exact_logits()[rows], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call.head.logits[rows], call.logits_one_by_one()[rows], rtol=1e-4, atol=1e-4)


def test_errors_name_what_of_the_head_does_not_fit() -> None:
    call = make_call(CPU, torch.bfloat16, 2, SIZES, [3, 5]).with_head(72)
    head = call.head
    assert head is not None
    for changes, message in (
        ({"weight": head.weight[:71]}, r"head.weight has 71 rows, expected a multiple of 8"),
        ({"logits": head.logits[:1]}, r"head.logits is \(1, 72\) on cpu, expected a contiguous \(2, 72\) on cpu"),
        ({"embedding": head.embedding[:64]}, r"head.embedding is \(64, 64\) on cpu, expected a contiguous \(72, 64\)"),
        ({"token_ids": head.token_ids[:1]}, r"head.token_ids is \(1,\) on cpu, expected a contiguous \(2,\)"),
        ({"weight": head.weight[0, 0]}, r"head.weight has 0 rows, expected a multiple of 8"),
        ({"token_ids": head.token_ids - 3}, r"head.token_ids\[1\] is -4, expected -2 ≤ head.token_ids ≤ 71, V - 1"),
        (
            {"token_ids": head.token_ids + 72},
            r"head.token_ids\[0\] is [0-9]+, expected -2 ≤ head.token_ids ≤ 71, V - 1",
        ),
        ({"drawn": None}, r"head.token_ids\[1\] is -1, expected 0 ≤ head.token_ids ≤ 71, V - 1"),
    ):
        with pytest.raises(ValueError, match=f"decode_layers: {message}"):
            _changed(call, head=dataclasses.replace(head, **changes)).run(None)
    for changes, message in (
        ({"drawn": head.token_ids.long()}, r"head.drawn is torch.int64, expected torch.int32"),
        ({"norm": head.norm.float()}, r"head.norm is torch.float32, expected torch.bfloat16"),
        ({"token_ids": None}, r"head.token_ids is a NoneType, expected a Tensor"),
        ({"norm": None}, r"head.norm is a NoneType, expected a Tensor"),
        ({"drawn": [1, 2]}, r"head.drawn is a list, expected a Tensor"),
    ):
        with pytest.raises(TypeError, match=f"decode_layers: {message}"):
            _changed(call, head=dataclasses.replace(head, **changes)).run(None)
    trained = dataclasses.replace(head, norm=torch.nn.Parameter(head.norm))
    with pytest.raises(ValueError, match=r"decode_layers: head.norm requires grad, expected no grad"):
        _changed(call, head=trained).run(None)
    with torch.no_grad():
        _changed(call, head=trained).run(None)


def _changed(call: DecodeCall, **changes: object) -> DecodeCall:
    return dataclasses.replace(call, **changes)  # type: ignore[arg-type]


def test_errors_name_what_does_not_fit() -> None:
    call = make_call(CPU, torch.bfloat16, 2, SIZES, [3, 5])
    weights = call.weights
    short = dataclasses.replace(weights, out=weights.out[:1])
    wide = dataclasses.replace(weights, gate_up=[weights.gate_up[0], weights.gate_up[1][:-2]])
    other = dataclasses.replace(weights, down=[weights.down[0], weights.down[1].float()])
    lone = dataclasses.replace(weights, q_norm=[torch.ones(64, dtype=torch.bfloat16)] * 2)
    no_heads = {name: [t[:, :, :0].contiguous() for t in getattr(call, name)] for name in ("k_cache", "v_cache")}
    for changes, message in (
        ({"weights": short}, r"weights.out has 1 tensors, expected 2 as k_cache"),
        ({"weights": wide}, r"weights.gate_up\[1\] is \(254, 64\) on cpu, expected a contiguous \(256, 64\)"),
        ({"weights": lone}, r"weights.k_norm has 0 tensors, expected 2 as q_norm"),
        ({"k_cache": []}, r"k_cache has 0 tensors, expected 1 to 128"),
        ({"v_cache": call.v_cache[:1]}, r"v_cache has 1 tensors, expected 2 as k_cache"),
        ({"activation": "gelu"}, r"activation is 'gelu', expected one of 'silu', 'gelu_tanh'"),
        ({"sizes": (64, 128, 3, 2, 64)}, r"num_heads is 3, expected a multiple of Hk = 2"),
        (no_heads, r"k_cache\[0\] is \(4, 16, 0, 64\), expected at least one key a page, KV head and dim"),
        ({"rows": {**call.rows, "cos_sin": call.rows["cos_sin"][:, :32]}}, r"cos_sin has 32 columns, expected D = 64"),
    ):
        with pytest.raises(ValueError, match=f"decode_layers: {message}"):
            _changed(call, **changes).run(None)
    with pytest.raises(TypeError, match=r"weights.down\[1\] is torch.float32, expected torch.bfloat16 as residual"):
        _changed(call, weights=other).run(None)


def test_errors_name_what_is_of_a_wrong_kind() -> None:
    call = make_call(CPU, torch.bfloat16, 2, SIZES, [3, 5])
    tiles = call.in_fp4(16).weights.qkv
    for weights, message in (
        (None, "weights is a NoneType, expected DecoderWeights or DecoderFp4Weights"),
        ({"qkv": tiles}, "weights.qkv is a Fp4Tiles, expected a list of tensors"),
        ({"down": tiles}, "weights.down is a Fp4Tiles, expected a list of tensors"),
        ({"qkv": [None, None]}, r"weights.qkv\[0\] is a NoneType, expected a Tensor"),
        ({"down": [1, 2]}, r"weights.down\[0\] is a int, expected a Tensor"),
        ({"q_norm": None}, "weights.q_norm is a NoneType, expected a list of tensors"),
    ):
        wrong = weights if weights is None else dataclasses.replace(call.weights, **weights)
        with pytest.raises(TypeError, match=f"decode_layers: {message}"):
            _changed(call, weights=wrong).run(None)
    with pytest.raises(TypeError, match="decode_layers: head is a str, expected a DecoderHead or None"):
        _run(call, head="x")
    with pytest.raises(TypeError, match=r"decode_layers: num_heads is 4\.0, a float, expected an int"):
        _run(call, num_heads=4.0)
    with pytest.raises(TypeError, match="decode_layers: softmax_scale is 'x', a str, expected"):
        _run(call, softmax_scale="x")
    for name, caches, message in (
        ("k_cache", None, "k_cache is a NoneType, expected a list of tensors"),
        ("k_cache", [None, None], r"k_cache\[0\] is a NoneType, expected a Tensor"),
        ("v_cache", call.v_cache[0], "v_cache is a Tensor, expected a list of tensors"),
    ):
        with pytest.raises(TypeError, match=f"decode_layers: {message}"):
            _run(call, **{name: caches})
    for down, message in (
        ([torch.tensor(1.0)] * 2, r"weights.down\[0\] has shape \(\), expected \(N, I\)"),
        ([torch.nn.Parameter(t) for t in call.weights.down], r"weights.down\[0\] requires grad, expected no grad"),
    ):
        with pytest.raises(ValueError, match=f"decode_layers: {message}"):
            _changed(call, weights=dataclasses.replace(call.weights, down=down)).run(None)


def _run(call: DecodeCall, **changes: Any) -> None:
    """In place, unlike `DecodeCall.run`."""
    arguments = {"residual": call.residual, "weights": call.weights, "k_cache": call.k_cache, "v_cache": call.v_cache}
    options = {"num_heads": call.sizes[2], "softmax_scale": 0.125}
    ops.decode_layers(**{**arguments, **call.rows, **options, **changes})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("positions", [-1, 4], r"positions\[0\] is -1, expected 0 ≤ positions ≤ 5, max_position - 1 from cos_sin"),
        ("positions", [2, 10**6], r"positions\[1\] is 1000000, expected 0 ≤ positions ≤ 5"),
        (
            "slot_mapping",
            [-2, 3],
            r"slot_mapping\[0\] is -2, expected -1 ≤ slot_mapping ≤ 63, num_blocks \* block_size",
        ),
        ("slot_mapping", [10**6, 3], r"slot_mapping\[0\] is 1000000, expected -1 ≤ slot_mapping ≤ 63"),
        ("seqused_k", [-1, 5], r"seqused_k\[0\] is -1, expected 0 ≤ seqused_k ≤ 32, max_blocks \*"),
        ("seqused_k", [3, 33], r"seqused_k\[1\] is 33, expected 0 ≤ seqused_k ≤ 32"),
        ("block_table", [[4, 0], [0, 0]], r"block_table\[0, 0\] is 4, expected 0 ≤ block < 4"),
        ("block_table", [[1, 4], [-1, 0]], r"block_table\[1, 0\] is -1, expected 0 ≤ block < 4"),
    ],
)
def test_values_that_do_not_fit_are_named_before_anything_is_written(
    name: str, values: list[int], message: str
) -> None:
    call = make_call(CPU, torch.bfloat16, 2, SIZES, [3, 5])
    changed = [call.residual, *call.k_cache, *call.v_cache]
    before = [t.nan_to_num(7.0) for t in changed]
    with pytest.raises(ValueError, match=f"decode_layers: {message}"):
        _run(call, **{name: torch.tensor(values, dtype=torch.int32)})
    assert all(torch.equal(a, b.nan_to_num(7.0)) for a, b in zip(before, changed, strict=True))


def test_errors_name_what_the_kernel_does_not_take() -> None:
    fitting = {
        "residual": (2, 576), "intermediate_size": 1536, "num_heads": 9, "cache": (40, 16, 3, 64),
        "workspace_words": ops.decode_layers_workspace(576, 1536, 9, 3, 64, CPU).numel(), "num_sms": 132,
    }  # fmt: skip
    check_kernel_sizes(**fitting)  # type: ignore[arg-type]
    for changes, message in (
        ({"residual": (5, 576)}, "residual has 5 tokens, expected at most 4"),
        ({"residual": (2, 600)}, "residual has N = 600 columns, expected a multiple of 64"),
        ({"residual": (2, 0)}, "residual has N = 0 columns, expected a multiple of 64"),
        ({"intermediate_size": 1540}, "weights.down has I = 1540 columns, expected a multiple of 64"),
        ({"num_heads": 15}, "num_heads is 15, expected at most 12, 4 for each of 3 KV heads"),
        ({"cache": (40, 16, 3, 96)}, "k_cache has D = 96, expected 64 or 128"),
        ({"cache": (40, 24, 3, 64)}, "k_cache has pages of 24 keys, expected a power of two"),
        ({"workspace_words": 7}, "workspace has 7 elements, expected the [0-9]+ of decode_layers_workspace"),
        ({"num_sms": 17}, "residual has 2 tokens of 9 heads, expected at most 17 heads in all, the CTAs of 17 SMs"),
        ({"residual": (1, 576), "intermediate_size": 64}, "residual has 1 tokens of 9 heads, expected at most 8 heads"),
        ({"residual": (1, 1280), "num_sms": 9}, "residual has N = 1280 columns, expected at most 1152 with 9 CTAs"),
    ):
        with pytest.raises(ValueError, match=f"decode_layers: {message}.* on a GPU"):
            check_kernel_sizes(**{**fitting, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "sizes", "in_tiles", "most"),
    [
        (4, (4096, 22016, 32, 8, 128), False, 17568),
        (4, (8192, 28672, 32, 8, 128), False, 17568),
        (3, (5120, 27648, 40, 10, 128), False, 23776),
        (4, (4096, 17024, 32, 8, 128), True, 16992),
    ],
)
def test_errors_name_what_shared_memory_has_no_room_for(
    tokens: int, sizes: tuple[int, int, int, int, int], in_tiles: bool, most: int
) -> None:
    n, intermediate, heads, kv_heads, head_dim = sizes
    words = ops.decode_layers_workspace(*sizes, torch.device("meta")).numel()
    rest = heads, (40, 16, kv_heads, head_dim), words, 132
    check_kernel_sizes((tokens, n), most // 64 * 64, *rest, in_tiles=in_tiles)
    message = f"residual has {tokens} tokens of N = {n} columns, weights.down I = {intermediate}, expected N, I and H D up to {most}"
    with pytest.raises(ValueError, match=f"decode_layers: {message}, of which .* on a GPU"):
        check_kernel_sizes((tokens, n), intermediate, *rest, in_tiles=in_tiles)


def test_which_models_it_is_for() -> None:
    assert ops.decode_layers_max_tokens(576, 1536, 9, 3, 64) == 4  # SmolLM2-135M
    assert ops.decode_layers_max_tokens(4096, 14336, 32, 8, 128) == 4  # Llama-3-8B
    assert ops.decode_layers_max_tokens(8192, 28672, 64, 8, 128) == 0  # 8 heads a KV head
    assert ops.decode_layers_max_tokens(576, 1536, 9, 3, 96) == 0
    assert ops.decode_layers_max_tokens(512, 512, 8, 8, 64) == 0  # fewer gates than CTAs
    assert ops.decode_layers_max_tokens(4096, 14336, 32, 8, 128, num_sms=114) == 3  # a CTA for each head
    assert ops.decode_layers_max_tokens(4096, 14336, 32, 8, 128, in_tiles=True) == 4
    assert ops.decode_layers_max_tokens(576, 1536, 9, 3, 64, in_tiles=True) == 0  # heads of 64
