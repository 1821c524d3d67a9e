"""The operators once more, as plainly as possible and apart from fastattn.reference: no masks, no batching, loops over rows.

Each takes a call's arguments and a dtype to compute in: fp64 gives the exact result, the result's own dtype gives the "plain
torch version" of the 2× rule. Everything is on the CPU. What is returned: the results, then the arguments that are changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(c: torch.dtype, x: Tensor, weight: Tensor, eps: float = 1e-6) -> list[Tensor]:
    x = x.to(c)
    mean = (x * x).sum(-1, keepdim=True) / x.shape[-1]
    return [x / (mean + eps).sqrt() * weight.to(c)]


def add_rms_norm(c: torch.dtype, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> list[Tensor]:
    total = (x.double() + residual.double()).to(x.dtype)
    return [*rms_norm(c, total, weight, eps), total]


def layer_norm(
    c: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> list[Tensor]:
    x = x.to(c)
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.to(c)
    return [out if bias is None else out + bias.to(c)]


def swiglu(c: torch.dtype, x: Tensor) -> list[Tensor]:
    half = x.shape[-1] // 2
    gate, up = x[..., :half].to(c), x[..., half:].to(c)
    return [gate / (1 + (-gate).exp()) * up]


def geglu(c: torch.dtype, x: Tensor, approximate: str = "tanh") -> list[Tensor]:
    half = x.shape[-1] // 2
    gate, up = x[..., :half].to(c), x[..., half:].to(c)
    if approximate == "tanh":
        act = gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2
    else:
        act = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return [act * up]


def linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    batch_invariant: bool = False,
) -> list[Tensor]:
    out = F.linear(x.to(c), weight.to(c), None if bias is None else bias.to(c))
    return [out if residual is None else out + residual.to(c)]


def _rms_normed(c: torch.dtype, x: Tensor, eps: float, sums_of_squares: Tensor | None) -> Tensor:
    if sums_of_squares is None:
        return rms_norm(c, x, torch.ones_like(x[..., :1]), eps)[0]
    return x.to(c) / (sums_of_squares.to(c).sum(-1, keepdim=True) / max(x.shape[-1], 1) + eps).sqrt()


def rms_norm_linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    sums_of_squares: Tensor | None = None,
) -> list[Tensor]:
    return linear(c, _rms_normed(c, x, eps, sums_of_squares), weight, bias)


def layer_norm_linear(
    c: torch.dtype, x: Tensor, weight: Tensor, weight_sum: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> list[Tensor]:
    return linear(c, layer_norm(c, x, torch.ones_like(x[..., :1]), None, eps)[0], weight, bias)


def gated_linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    batch_invariant: bool = False,
) -> list[Tensor]:
    """Row by row of the weight: blocks of eight gates and their ups, the last one shorter."""
    n = weight.shape[0] // 2
    product = linear(c, x, weight, bias)[0]
    gates, ups = [], []
    for first in range(0, n, 8):
        size = min(8, n - first)
        gates += range(2 * first, 2 * first + size)
        ups += range(2 * first + size, 2 * first + 2 * size)
    halves = torch.cat([product[..., gates], product[..., ups]], -1)
    if activation == "silu":
        return swiglu(c, halves)
    return geglu(c, halves, "tanh" if activation == "gelu_tanh" else "none")


def rms_norm_gated_linear(
    c: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    sums_of_squares: Tensor | None = None,
) -> list[Tensor]:
    return gated_linear(c, _rms_normed(c, x, eps, sums_of_squares), weight, bias, activation)


def int8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    rows = x.double() if x_zero_point is None else x.double() - x_zero_point.double()[:, None]
    out = (rows @ weight.double().t()) * x_scale.double()[:, None] * weight_scale.double()  # exact sums
    return [out.to(c) if bias is None else out.to(c) + bias.to(c)]


def fp8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast_accum: bool = False,
    batch_invariant: bool = False,
) -> list[Tensor]:
    rows = x.double() * x_scale.double()[:, None]
    columns = weight.double() * weight_scale.double()[:, None]
    out = (rows @ columns.t()).to(c)
    return [out if bias is None else out + bias.to(c)]


def sparse_24_weight(values: Tensor, metadata: Tensor) -> Tensor:
    """(N, K) fp64 of values (N, K/2), by where a product's registers have the four bits of a row and of four columns."""
    n, half = values.shape
    row = torch.arange(n, device=values.device)[:, None]
    four = torch.arange(half // 2, device=values.device)[None]
    in_unit, is_high = four % 16, row // 8 % 2
    if values.itemsize == 1:  # a lane of four has 32 columns of a row
        quarter, bit = in_unit // 8 * 2 + is_high, in_unit % 8 * 4
    else:  # 16 columns of two rows
        quarter, bit = in_unit // 4, is_high * 16 + in_unit % 4 * 4
    place = metadata[row // 128, four // 16, row % 128 // 16 * 32 + row % 8 * 4 + quarter] >> bit
    weight = torch.zeros(n, half // 2, 4, dtype=torch.float64, device=values.device)
    places = torch.stack([place & 3, place >> 2 & 3], -1).long()
    return weight.scatter_(-1, places, values.double().reshape(n, half // 2, 2)).view(n, 2 * half)


def sparse_linear(
    c: torch.dtype, x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None
) -> list[Tensor]:
    return linear(c, x, sparse_24_weight(values, metadata), bias)


def sparse_int8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    return int8_linear(c, x, x_scale, sparse_24_weight(values, metadata), weight_scale, bias)


def sparse_fp8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    values: Tensor,
    metadata: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast_accum: bool = False,
) -> list[Tensor]:
    return fp8_linear(c, x, x_scale, sparse_24_weight(values, metadata), weight_scale, bias)


def fp8_block_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Block by block, each sum times its two scales."""
    out = torch.zeros(len(x), len(weight), dtype=torch.float64, device=x.device)
    blocks = torch.arange(len(weight), device=x.device) // 128
    for g in range(-(-x.shape[1] // 128)):
        rows, columns = (t[:, 128 * g : 128 * (g + 1)].double() for t in (x, weight))
        out += (rows @ columns.t()) * x_scale[g].double()[:, None] * weight_scale[blocks, g].double()
    return [out.to(c) if bias is None else out.to(c) + bias.to(c)]


def _nibbles(packed: Tensor, columns: Tensor) -> Tensor:
    """Codes 0 … 15 of these columns of each row, whatever the element's width."""
    per_element = 2 * packed.element_size()
    return (packed.long()[:, columns // per_element] >> (columns % per_element * 4)) & 15


def int4_linear(
    c: torch.dtype,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1], device=x.device)
    groups = columns // group_size
    zero = 8 if zero_point is None else 8 + zero_point.long()[:, groups]
    weight = (_nibbles(weight_packed, columns) - zero).to(c) * weight_scale.to(c)[:, groups]
    return linear(c, x, weight, bias)


def _e4m3(bits: Tensor) -> Tensor:
    """A sign, four bits of exponent, three of mantissa; the sign is left out."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).double()
    return torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.double() - 10))


def fp4_linear(
    c: torch.dtype,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    tile_order: int = 16,  # rows have none
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1], device=x.device)
    bits = weight_scale.long()
    scale = _e4m3(bits) if group_size == 16 else 2.0 ** (bits.double() - 127)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    numbers = torch.tensor(values, dtype=c, device=x.device)
    weight = numbers[_nibbles(weight_packed, columns)] * scale.to(c)[:, columns // group_size]
    out = linear(c, x, weight)[0]
    out = out if global_scale is None else out / global_scale.to(c)
    return [out if bias is None else out + bias.to(c)]


def fp4_fp8_linear(
    c: torch.dtype,
    x: Tensor,
    x_scale: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_size: int,
    global_scale: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    fast_accum: bool = True,
) -> list[Tensor]:
    columns = torch.arange(x.shape[-1], device=x.device)
    bits = weight_scale.long()
    if group_size == 16:
        scale, factor = _e4m3(bits) / 8, torch.full((len(bits),), 8.0, dtype=torch.float64, device=x.device)
    else:
        largest = bits.amax(1, keepdim=True) if bits.shape[1] else bits.new_zeros(len(bits), 1)
        scale, factor = 2.0 ** (bits - largest + 6).double(), 2.0 ** (largest[:, 0] - 133).double()
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    numbers = torch.tensor(values, dtype=torch.float64, device=x.device)
    weight = numbers[_nibbles(weight_packed, columns)] * scale[:, columns // group_size]
    # By torch's cast, not by powers of two: on a GPU pow(2, n) is off by a bit, and ties would not go to even.
    weight = weight.float().to(torch.float8_e4m3fn).double() * factor[:, None]
    if global_scale is not None:
        weight = weight / global_scale.double()[:, None]
    out = ((x.double() * x_scale.double()[:, None]) @ weight.t()).to(c)
    return [out if bias is None else out + bias.to(c)]


def embedding(
    c: torch.dtype, token_ids: Tensor, weight: Tensor, scale: float = 1.0, drawn: Tensor | None = None
) -> list[Tensor]:
    ids = [i if i >= 0 or drawn is None else int(drawn[-1 - i]) for i in token_ids.tolist()]
    rows = [weight[i].to(c) * scale if 0 <= i < len(weight) else torch.zeros_like(weight[0]).to(c) for i in ids]
    return [torch.stack(rows) if rows else weight.new_empty((0, weight.shape[1])).to(c)]


def numbers_of_cache(c: torch.dtype, cache: Tensor, scale: Tensor | None) -> Tensor:
    """A cache (num_blocks, block_size, Hk, D), times scale (Hk) or (num_blocks, block_size, Hk) if it is of 8 bits."""
    if cache.dtype.itemsize > 1:
        return cache
    return cache.to(c) if scale is None else cache.to(c) * scale.to(c).unsqueeze(-1)


def rope_kv_write(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    interleaved: bool = False,
    hadamard: bool = False,
) -> list[Tensor]:
    half = cos_sin.shape[1] // 2

    def turn(x: Tensor, weight: Tensor | None, position: int) -> Tensor:
        if weight is not None:
            x = rms_norm(torch.float64, x, weight, norm_eps)[0].to(x.dtype)
        out = x.to(c).clone()
        a = [2 * i if interleaved else i for i in range(half)]
        b = [2 * i + 1 if interleaved else i + half for i in range(half)]
        cos, sin = cos_sin[position, :half].to(c), cos_sin[position, half:].to(c)
        out[..., a] = x[..., a].to(c) * cos - x[..., b].to(c) * sin
        out[..., b] = x[..., b].to(c) * cos + x[..., a].to(c) * sin
        return out @ mix if hadamard else out

    # Entry (i, j) of a block: minus if i and j have an odd number of bits in common.
    dim = q.shape[2]
    block = dim & -dim
    signs = [
        [(-1) ** (i % block & j % block).bit_count() if i // block == j // block else 0 for j in range(dim)]
        for i in range(dim)
    ]
    mix = torch.tensor(signs, dtype=c, device=q.device) / block**0.5
    q_out, k_out, v_out = q.to(c), k_cache.to(c), v_cache.to(c)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slot_mapping.tolist(), strict=True)):
        q_out[t] = turn(q[t], q_norm_weight, position)
        if slot >= 0:
            k_out[slot // k_cache.shape[1], slot % k_cache.shape[1]] = turn(k[t], k_norm_weight, position)
            v_out[slot // k_cache.shape[1], slot % k_cache.shape[1]] = v[t].to(c)
    return [q_out, k_out, v_out]


def _numbers(c: torch.dtype, t: Tensor, descale: Tensor | None, b: int) -> Tensor:
    """Sequence b of an argument, (S, heads, D), times its scales (B, Hk), if it has any."""
    t = t.to(c)
    if descale is not None:
        t = t * descale[b].to(c).repeat_interleave(t.shape[1] // descale.shape[1])[:, None]
    return t


def _options(head_dim: int, options: dict[str, Any]) -> dict[str, Any]:
    none = dict.fromkeys(("alibi_slopes", "sinks", "q_descale", "k_descale", "v_descale", "seqused_q", "seqused_k"))
    given = {"window_size": (-1, -1), "softcap": 0.0, "causal": False} | none | options
    if given.get("softmax_scale") is None:
        given["softmax_scale"] = head_dim**-0.5
    return given


def _of_heads(t: Tensor | None, b: int, q: Tensor, absent: float) -> Tensor:
    """(H) of sequence b, from (H), (B, H) or nothing; q (…, H, D)."""
    if t is None:
        return torch.full((q.shape[-2],), absent, device=q.device)
    return t[b] if t.dim() == 2 else t


def _attention_row(
    c: torch.dtype, q: Tensor, k: Tensor, v: Tensor, i: int, num_rows: int, b: int, o: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Row i of sequence b: q (H, D), k (Sk, H, D), v (Sk, H, Dv). Takes only the keys it sees."""
    at = i + k.shape[0] - num_rows
    left, right = o["window_size"]
    right = 0 if o["causal"] else right
    words = o.get("trees", {}).get(b)
    if words is None:
        seen = [j for j in range(k.shape[0]) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)]
        distances = [abs(at - j) for j in seen]
    else:  # the path to the row's own key
        seen = [j for j in range(at + 1) if j < at - i or words[i] >> (j - at + i) & 1]
        seen = seen[len(seen) - left - 1 :] if 0 <= left < len(seen) else seen
        distances = list(range(len(seen)))[::-1]
    sinks = _of_heads(o["sinks"], b, q, -math.inf).to(c)
    if not seen:
        return torch.zeros(v.shape[1:], dtype=c), sinks
    keys, values = k[seen], v[seen]
    scores = torch.einsum("hd,khd->hk", q, keys) * o["softmax_scale"]
    if o["softcap"] > 0:
        scores = o["softcap"] * torch.tanh(scores / o["softcap"])
    scores = scores - _of_heads(o["alibi_slopes"], b, q, 0.0).to(c)[:, None] * torch.tensor(distances, dtype=c)
    scores = torch.cat([scores, sinks[:, None]], 1)
    weights = torch.softmax(scores, -1)[:, :-1]
    if o.get("in_fp8") and c is not torch.float64:  # plainly, the product with v is in v's dtype
        weights = weights.to(torch.float8_e4m3fn).to(c)
    return torch.einsum("hk,khd->hd", weights, values), torch.logsumexp(scores, -1)


def _attention(
    c: torch.dtype, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """out (Sq, H, Dv) and lse (H, Sq) of each sequence: queries (Sq, H, D), keys (Sk, Hk, D), values (Sk, Hk, Dv)."""
    results = []
    for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        o = _options(q.shape[-1], options) | {"in_fp8": q.dtype is torch.float8_e4m3fn}
        q, k, v = (_numbers(c, t, o[f"{n}_descale"], b) for n, t in (("q", q), ("k", k), ("v", v)))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        rows = [_attention_row(c, q[i], k, v, i, q.shape[0], b, o) for i in range(q.shape[0])]
        out = torch.stack([out for out, _ in rows]) if rows else q.new_zeros((0, q.shape[1], v.shape[-1]))
        results.append((out, torch.stack([lse for _, lse in rows], 1) if rows else q.new_zeros((q.shape[1], 0))))
    return results


def attention_matrix(
    c: torch.dtype, queries: list[Tensor], keys: list[Tensor], values: list[Tensor], **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """The same as matrix products, on any device: what plain torch in a dtype computes, and so are the gradients through it."""
    results = []
    for b, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        o = _options(q.shape[-1], options)
        k, v = (t.to(c).repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
        sinks = _of_heads(o["sinks"], b, q, -math.inf).to(c)[:, None]
        if k.shape[1] == 0:
            results.append((q.new_zeros((*q.shape[:2], v.shape[-1]), dtype=c), sinks.expand(-1, q.shape[0])))
            continue
        scores = q.to(c).transpose(0, 1) @ k.transpose(1, 2) * o["softmax_scale"]
        if o["softcap"] > 0:
            scores = o["softcap"] * torch.tanh(scores / o["softcap"])
        at = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[1] - q.shape[0]
        offset = torch.arange(k.shape[1], device=q.device)[None] - at
        slopes = _of_heads(o["alibi_slopes"], b, q, 0.0).to(c)
        scores = scores - slopes[:, None, None] * offset.abs()
        left, right = o["window_size"]
        right = 0 if o["causal"] else right
        hidden = torch.zeros_like(offset, dtype=torch.bool)
        if left >= 0:
            hidden |= offset < -left
        if right >= 0:
            hidden |= offset > right
        sees = (~hidden).any(1)  # a row that sees nothing has no gradient, and torch's softmax of it is NaN
        scores = scores.masked_fill(hidden & sees[:, None], -math.inf)
        scores = torch.cat([scores, sinks[:, None].expand(-1, q.shape[0], 1)], 2)
        out = torch.where(sees[:, None], torch.softmax(scores, -1)[..., :-1] @ v, 0)
        results.append((out.transpose(0, 1), torch.where(sees, torch.logsumexp(scores, -1), sinks)))
    return results


def paged_attention(
    c: torch.dtype,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    causal: bool = True,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool = False,
    **options: Any,
) -> list[Tensor]:
    size = k_cache.shape[1]

    def gather(cache: Tensor, scale: Tensor | None) -> list[Tensor]:
        cache = numbers_of_cache(c, cache, scale)
        out = []
        for n, table in zip(seqused_k.tolist(), block_table.tolist(), strict=True):
            out.append(torch.stack([cache[table[i // size], i % size] for i in range(n)]) if n else cache[0, :0])
        return out

    starts = cu_seqlens_q.tolist()
    queries = [q[starts[b] : starts[b + 1]] for b in range(len(starts) - 1)]
    words = [] if tree_mask is None else [tree_mask[starts[b] : starts[b + 1]].tolist() for b in range(len(queries))]
    options["trees"] = {b: own for b, own in enumerate(words) if len(own) <= 64}
    results = _attention(c, queries, gather(k_cache, k_scale), gather(v_cache, v_scale), causal=causal, **options)
    return _packed(c, q, q.shape[-1], starts, results)


def _packed(
    c: torch.dtype, q: Tensor, v_head_dim: int, starts: list[int], results: list[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """out (T, H, Dv) and lse (H, T): 0 and -inf for rows of q that no result is about."""
    outs, logs = [], []
    for b, (out, lse) in enumerate(results):
        unused = starts[b + 1] - starts[b] - out.shape[0]
        outs += [out, out.new_zeros((unused, q.shape[1], v_head_dim))]
        logs += [lse, lse.new_full((q.shape[1], unused), -math.inf)]
    if not results:
        return [q.new_zeros((0, q.shape[1], v_head_dim), dtype=c), q.new_zeros((q.shape[1], 0), dtype=c)]
    return [torch.cat(outs), torch.cat(logs, 1)]


def batch_attention(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str = "auto",
    deterministic: bool = False,
    attend: Any = _attention,
    **options: Any,
) -> list[Tensor]:
    results = attend(c, list(q), list(k), list(v), **options)
    if not results:
        return [torch.zeros((*q.shape[:3], v.shape[-1]), dtype=c), torch.zeros(0, q.shape[2], q.shape[1], dtype=c)]
    return [torch.stack([out for out, _ in results]), torch.stack([lse for _, lse in results])]


def varlen_attention(
    c: torch.dtype,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    attend: Any = _attention,
    **options: Any,
) -> list[Tensor]:
    def parts(t: Tensor, offsets: Tensor, used: Tensor | None) -> list[Tensor]:
        at = offsets.tolist()
        counts = offsets.diff() if used is None else used
        return [t[at[b] : at[b] + n] for b, n in enumerate(counts.tolist())]

    keys, values = (parts(t, cu_seqlens_k, seqused_k) for t in (k, v))
    results = attend(c, parts(q, cu_seqlens_q, seqused_q), keys, values, **options)
    return _packed(c, q, v.shape[-1], cu_seqlens_q.tolist(), results)


def gradients(
    forward: Any, c: torch.dtype, dout: Tensor, call: dict[str, Any], dlse: Tensor | None = None
) -> list[Tensor]:
    """Of q, k, v, and of sinks if the call has them, through torch's autograd."""
    names = [name for name in ("q", "k", "v", "sinks") if call.get(name) is not None]
    leaves = [call[name].detach().to(c).requires_grad_() for name in names]
    with torch.enable_grad():
        out, lse = forward(c, **call | dict(zip(names, leaves, strict=True)), attend=attention_matrix)
    results = ((out, dout.to(c)), (lse, torch.zeros_like(lse) if dlse is None else dlse.to(c)))
    given = [pair for pair in results if pair[0].requires_grad]  # without keys none may
    if not given:
        return [torch.zeros_like(t) for t in leaves]
    return list(
        torch.autograd.grad(
            [result for result, _ in given], leaves, [upstream for _, upstream in given], materialize_grads=True
        )
    )


def errors_from_rounded_out(
    forward: Any, dout: Tensor, out: Tensor, exact_out: Tensor, call: dict[str, Any]
) -> list[float]:
    """How much of each gradient's error comes from `out` as it was kept, in its own dtype: delta, the sum of dout * out of
    a row, is taken from there and not from P and dP. An error of delta acts like a gradient of -lse."""
    error = (dout.double() * (out.double() - exact_out.double())).nan_to_num(0.0).sum(-1).transpose(-1, -2)
    return [
        float(t.abs().max()) if t.numel() else 0.0
        for t in gradients(forward, torch.float64, torch.zeros_like(dout), call, -error)
    ]


def batch_attention_backward(
    c: torch.dtype, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None, **call: Any
) -> list[Tensor]:
    return gradients(batch_attention, c, dout, call, dlse)


def varlen_attention_backward(
    c: torch.dtype, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None, **call: Any
) -> list[Tensor]:
    return gradients(varlen_attention, c, dout, call, dlse)


def merge_attention_states(c: torch.dtype, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> list[Tensor]:
    out, lse = out_a.to(c).clone(), lse_a.to(c).clone()
    for where in torch.cartesian_prod(*(torch.arange(n) for n in lse.shape)).tolist() if lse.numel() else []:
        *batch, head, row = where
        sides = [(o[(*batch, row, head)].to(c), s[tuple(where)].to(c)) for o, s in ((out_a, lse_a), (out_b, lse_b))]
        sides = [(o, s) for o, s in sides if not s.isinf()]
        logs = torch.stack([s for _, s in sides] or [torch.tensor(-math.inf, dtype=c)])
        lse[tuple(where)] = torch.logsumexp(logs, 0)
        weights = torch.softmax(logs, 0)
        out[(*batch, row, head)] = sum(w * o for w, (o, _) in zip(weights, sides, strict=False)) if sides else 0
    return [out, lse]


def adjust_logits(
    c: torch.dtype,
    logits: Tensor,
    token_ids: Tensor,
    counts: Tensor,
    bias: Tensor,
    indptr: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> list[Tensor]:
    out = logits.to(c).clone()
    for b in range(logits.shape[0]):
        for i in range(int(indptr[b]), int(indptr[b + 1])):
            old, count = out[b, token_ids[i]].clone(), int(counts[i])
            if count >= 0:
                rep = repetition_penalty[b].to(c)
                old = old / rep if old > 0 else old * rep
            if count > 0:
                old = old - presence_penalty[b].to(c) - frequency_penalty[b].to(c) * count
            out[b, token_ids[i]] = old + bias[i].to(c)
    return [out]


def apply_token_bitmask(c: torch.dtype, logits: Tensor, bitmask: Tensor, rows: Tensor) -> list[Tensor]:
    out = logits.to(c).clone()
    for r, row in enumerate(rows.tolist()):
        for token in range(logits.shape[1]):
            if not (int(bitmask[r, token // 32]) >> (token % 32)) & 1:
                out[row, token] = -math.inf
    return [out]


def token_logprobs(c: torch.dtype, logits: Tensor, token_ids: Tensor, num_top: int) -> list[Tensor]:
    logprobs = torch.log_softmax(logits.to(c), -1)
    rows = logits.float().tolist()
    best = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:num_top] for row in rows]
    ids = torch.tensor(best, dtype=torch.int64).view(len(rows), num_top)
    chosen = token_ids.long().unsqueeze(1)
    rank = [1 + sum(v > row[i] for v in row) for row, i in zip(rows, token_ids.tolist(), strict=True)]
    return [
        logprobs.gather(1, chosen).squeeze(1),
        torch.tensor(rank, dtype=torch.int32),
        logprobs.gather(1, ids),
        ids.int(),
    ]
