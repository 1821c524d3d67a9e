"""fastattn.flashinfer beside attention: writing to pages, merges, norms and activations, rotary embedding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastattn.flashinfer as flashinfer
from tests.integrations.flashinfer_requests import (
    DIM,
    HEADS,
    Requests,
    close,
    dtypes,
    ints,
    layouts,
    make,
    skip_fp32_on_gpu,
)


@layouts
@pytest.mark.parametrize("form", ["one", "pair"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_append(page_size: int, form: str, layout: str, device: str) -> None:
    """What is appended in two ragged batches is what was in the pages from the start."""
    dtype = torch.bfloat16
    requests = Requests.make([7, 20, 1, 5], page_size, dtype, device)
    cache = requests.given(layout, form)
    empty = torch.full_like(cache, math.nan) if isinstance(cache, Tensor) else tuple(map(torch.zeros_like, cache))
    pages = [t.to(device) for t in (requests.indices, requests.indptr, requests.last_page_len)]
    lengths = flashinfer.get_seq_lens(pages[1], pages[2], page_size)
    assert lengths.tolist() == [7, 20, 1, 5]
    before = [0, 0, 0, 0]
    for after in ([4, 20, 0, 2], [7, 20, 1, 5]):
        parts = [slice(a, b) for a, b in zip(before, after, strict=True)]
        k, v = (torch.cat([t[p] for t, p in zip(ts, parts, strict=True)]) for ts in (requests.keys, requests.values))
        new = torch.tensor([0, *(b - a for a, b in zip(before, after, strict=True))]).cumsum(0).int().to(device)
        nnz = k.shape[0] + 2  # the last two are padding
        k, v = (torch.cat((t, torch.full_like(t[:1], math.nan).expand(2, -1, -1))) for t in (k, v))
        batch, position = flashinfer.get_batch_indices_positions(new, ints(*after, device=device), nnz)
        assert batch.dtype == position.dtype == torch.int32
        wanted = [(b, p) for b, part in enumerate(parts) for p in range(part.start, part.stop)]
        assert list(zip(batch.tolist(), position.tolist(), strict=True)) == [*wanted, (-1, 0), (-1, 0)]
        flashinfer.append_paged_kv_cache(k, v, batch, position, empty, *pages, kv_layout=layout)
        before = after
    for found, expected in zip(*((t,) if isinstance(t, Tensor) else t for t in (empty, cache)), strict=True):
        used = ~expected.isnan()
        assert torch.equal(found[used], expected[used])
        assert (found[~used].isnan() | (found[~used] == 0)).all()
    kept = [torch.empty(nnz, dtype=torch.int32, device=device) for _ in range(2)]
    again = flashinfer.get_batch_indices_positions(new, ints(*after, device=device), nnz, *kept)
    assert again[0] is kept[0] and torch.equal(again[0], batch) and torch.equal(again[1], position)


@dtypes
def test_merges(dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    q = make(6, HEADS[0], DIM, dtype=dtype, device=device)
    k, v = (make(24, HEADS[1], DIM, seed=i, dtype=dtype, device=device) for i in (1, 2))
    call = flashinfer.single_prefill_with_kv_cache_return_lse
    parts = [call(q, k[a:b], v[a:b]) for a, b in ((0, 3), (3, 17), (17, 24))]
    whole, whole_lse = call(q, k, v)
    first = flashinfer.merge_state(*parts[0], *parts[1])
    out, lse = flashinfer.merge_state(*first, *parts[2])
    close(out, whole)
    close(lse, whole_lse, dtype)
    empty = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    states = [torch.stack(t, 1) for t in zip(*parts, empty, strict=True)]
    out, lse = flashinfer.merge_states(*states)
    assert out.dtype == dtype and lse.dtype == torch.float32
    close(out, whole)
    close(lse, whole_lse, dtype)
    assert flashinfer.merge_states(*(t[:, 3:] for t in states))[0].eq(0).all()

    mask = torch.tensor([True, False, True, True, False, True], device=device)
    v_own, s_own = (t.clone() for t in parts[0])
    flashinfer.merge_state_in_place(v_own, s_own, *parts[1], mask=mask)
    for found, old, merged in zip((v_own, s_own), parts[0], first, strict=True):
        assert torch.equal(found[mask], merged[mask]) and torch.equal(found[~mask], old[~mask])
    v_own, s_own = (t.clone() for t in parts[0])
    flashinfer.merge_state_in_place(v_own, s_own, *parts[1])
    assert torch.equal(v_own, first[0]) and torch.equal(s_own, first[1])
    with pytest.raises(TypeError, match=r"s is torch.float16"):
        flashinfer.merge_state_in_place(v_own, s_own.half(), *parts[1])
    with pytest.raises(ValueError, match=r"\(T, parts, H\)"):
        flashinfer.merge_states(v_own, s_own)


@dtypes
def test_norms_and_activations(dtype: torch.dtype, device: str) -> None:
    skip_fp32_on_gpu(device, dtype)
    x, residual = make(5, 48, dtype=dtype, device=device), make(5, 48, seed=1, dtype=dtype, device=device)
    weight = make(48, seed=2, dtype=dtype, device=device)
    normed = torch.nn.functional.rms_norm
    out = torch.empty_like(x)
    assert flashinfer.rmsnorm(x, weight, 1e-5, out=out) is out
    close(out, normed(x.float(), (48,), weight.float(), 1e-5))
    total = x.float() + residual.float()
    flashinfer.fused_add_rmsnorm(x, residual, weight)
    close(residual, total)
    close(x, normed(total, (48,), weight.float(), 1e-6))
    gate, up = residual.float().chunk(2, -1)
    gelu = torch.nn.functional.gelu
    for function, expected in (
        (flashinfer.silu_and_mul, torch.nn.functional.silu(gate)),
        (flashinfer.gelu_and_mul, gelu(gate)),
        (flashinfer.gelu_tanh_and_mul, gelu(gate, approximate="tanh")),
    ):
        out = torch.empty(5, 24, dtype=dtype, device=device)
        close(function(residual), expected * up)
        assert function(residual, out) is out
        close(out, expected * up)


def turned(x: Tensor, positions: Tensor, frequencies: Tensor, interleave: bool) -> Tensor:
    """As complex numbers, in fp64."""
    half = frequencies.shape[0]
    x, rest = x[..., : 2 * half].double(), x[..., 2 * half :].double()
    a, b = (x[..., 0::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    angle = positions.double()[:, None, None] * frequencies
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    parts = torch.view_as_real(z)
    both = parts.flatten(-2) if interleave else torch.cat((parts[..., 0], parts[..., 1]), -1)
    return torch.cat((both, rest), -1)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 16])
def test_rope(rotary_dim: int | None, interleave: bool, device: str) -> None:
    dtype = torch.bfloat16
    qkv = make(7, 8, DIM, dtype=dtype, device=device)
    q, k = qkv[:, :4], qkv[:, 4:6]  # not contiguous
    indptr, offsets = ints(0, 3, 3, 7, device=device), ints(5, 9, 100, device=device)
    positions = ints(5, 6, 7, 100, 101, 102, 103, device=device)
    width = DIM if rotary_dim is None else rotary_dim
    base = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    llama = 5e5 ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    waves = 2 * math.pi / llama
    smooth = (8192 / waves - 1) / (4 - 1)
    blended = (1 - smooth) * llama / 8 + smooth * llama
    llama = torch.where(waves < 8192 / 4, llama, torch.where(waves > 8192, llama / 8, blended))
    for name, frequencies, options in (("rope", base / 2, {"rope_scale": 2.0}), ("llama31_rope", llama, {})):
        places = (rotary_dim, interleave)
        wanted = [turned(x, positions, frequencies, interleave) for x in (q, k)]
        for suffix, where in (("", (indptr, offsets)), ("_pos_ids", (positions,))):
            found = getattr(flashinfer, f"apply_{name}{suffix}")(q, k, *where, *places, **options)
            both = qkv.clone()
            assert (
                getattr(flashinfer, f"apply_{name}{suffix}_inplace")(
                    both[:, :4], both[:, 4:6], *where, *places, **options
                )
                is None
            )
            for out, own, expected in zip(found, (both[:, :4], both[:, 4:6]), wanted, strict=True):
                close(out, expected)
                assert torch.equal(out, own)
            assert torch.equal(both[:, 6:], qkv[:, 6:])


def test_rope_with_a_table(device: str) -> None:
    q, k = (make(6, h * DIM, seed=h, dtype=torch.float16, device=device) for h in HEADS)
    frequencies = 1e4 ** (-torch.arange(0, DIM, 2, dtype=torch.float64, device=device) / DIM)
    angles = torch.arange(50, device=device)[:, None] * frequencies
    table = torch.cat((angles.cos(), angles.sin()), -1).float()
    positions = torch.tensor([3, 49, 0, 7, 7, 1], device=device)
    for is_neox in (True, False):
        found = flashinfer.apply_rope_with_cos_sin_cache(positions, q, k, DIM, table, is_neox)
        for out, x in zip(found, (q, k), strict=True):
            close(out, turned(x.view(6, -1, DIM), positions, frequencies, not is_neox).flatten(1))
    with pytest.raises(ValueError, match=r"cos_sin_cache is torch.float16"):
        flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, q, k, DIM, table.half())
