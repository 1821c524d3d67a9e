"""Calls of `decode_layers`, and what it computes in fp64, from the formulas of its docstring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import ops
from fastattn.nn import interleave_gate_up, split_gate_up
from fastattn.reference import quantized

SMOLLM2 = (576, 1536, 9, 3, 64)  # hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim
SMALL = (1024, 3072, 16, 8, 128)


@dataclass
class DecodeCall:
    """A decoder's layers, and sequences that end with the token to compute; lengths 0 are rows of padding."""

    residual: Tensor
    weights: ops.DecoderWeights | ops.DecoderFp4Weights
    k_cache: list[Tensor]
    v_cache: list[Tensor]
    rows: dict[str, Tensor]
    sizes: tuple[int, int, int, int, int]
    activation: str = "silu"
    norm_eps: float = 1e-5
    head: ops.DecoderHead | None = None
    dense: ops.DecoderWeights | None = None  # what weights in 4 bits mean, in fp64, norms folded in

    def in_fp4(self, tile_order: int, seed: int = 0) -> DecodeCall:
        """The same with weights rounded to NVFP4, and norms."""
        w, device = self.weights, self.residual.device
        assert isinstance(w, ops.DecoderWeights)
        gen = torch.Generator(device=device).manual_seed(seed)
        n, layers = self.residual.shape[1], range(len(w.qkv))

        def tiles(matrices: list[Tensor]) -> tuple[ops.Fp4Tiles, list[Tensor]]:
            codes, scales, factors, values = [], [], [], []
            for matrix in matrices:
                packed, scale, factor = ops.quantize_nvfp4(matrix)
                codes.append(ops.pack_w4_tiles(packed, tile_order))
                scales.append(ops.pack_w4_scales(scale, 16)[0])
                factors.append(factor)
                exact = quantized.fp4_weight(packed, scale, 16, matrix.shape[1], torch.float64)
                values.append(exact / factor.double()[:, None])
            return ops.Fp4Tiles(codes, scales, factors), values

        def norms() -> list[Tensor]:
            return [(1 + 0.3 * torch.randn(n, device=device, generator=gen)).to(self.residual.dtype) for _ in layers]

        input_norm, mlp_norm = norms(), norms()
        qkv, of_qkv = tiles(list(w.qkv))
        out, of_out = tiles(list(w.out))
        gate_up, of_gate_up = tiles([torch.cat(split_gate_up(t)) for t in w.gate_up])
        down, of_down = tiles(list(w.down))
        small = {"qkv_bias": w.qkv_bias, "q_norm": w.q_norm, "k_norm": w.k_norm}
        dense = ops.DecoderWeights(
            [t * norm.double() for t, norm in zip(of_qkv, input_norm, strict=True)],
            of_out,
            [interleave_gate_up(*t.chunk(2)) * norm.double() for t, norm in zip(of_gate_up, mlp_norm, strict=True)],
            of_down,
            **small,
        )
        weights = ops.DecoderFp4Weights(qkv, out, gate_up, down, input_norm, mlp_norm, tile_order, **small)
        return replace(self, weights=weights, dense=dense)

    def run(self, workspace: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """On copies of what it changes."""
        residual = self.residual.clone()
        if self.head is not None:  # what is there says nothing
            residual.fill_(torch.nan)
            self.head.logits.fill_(torch.nan)
        k_cache, v_cache = ([t.clone() for t in caches] for caches in (self.k_cache, self.v_cache))
        ops.decode_layers(
            residual, self.weights, k_cache, v_cache, **self.rows, workspace=workspace, num_heads=self.sizes[2],
            softmax_scale=self.sizes[4] ** -0.5, activation=self.activation, norm_eps=self.norm_eps, head=self.head,
        )  # fmt: skip
        return residual, k_cache, v_cache

    def with_head(self, vocab_size: int, seed: int = 0) -> DecodeCall:
        """The same, whose stream begins with rows of embeddings, every other token's one that was drawn, and that makes logits."""
        device, dtype, (tokens, n) = self.residual.device, self.residual.dtype, self.residual.shape
        gen = torch.Generator(device=device).manual_seed(seed)
        tables = [torch.randn(vocab_size, n, device=device, generator=gen) * scale for scale in (1.0, n**-0.5)]
        ids = torch.randint(vocab_size, (tokens,), device=device, generator=gen, dtype=torch.int32)
        drawn = ids.flip(0).contiguous()
        at = torch.arange(tokens, device=device, dtype=torch.int32)
        embedding, weight = (table.to(dtype) for table in tables)
        norm = (1 + 0.3 * torch.randn(n, device=device, generator=gen)).to(dtype)
        logits = torch.empty(tokens, vocab_size, dtype=dtype, device=device)
        token_ids = torch.where(at % 2 == 1, at - tokens, ids)  # below 0: of drawn, the other way round
        head = ops.DecoderHead(token_ids, drawn, embedding, norm, weight, logits)
        return replace(self, residual=embedding[ids.long()], head=head)

    def exact_logits(self) -> Tensor:
        """In fp64, of the exact stream."""
        assert self.head is not None
        h = self.exact()
        h = h * (h.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.head.norm.double()
        return h @ self.head.weight.double().T

    def logits_one_by_one(self) -> Tensor:
        assert self.head is not None
        return ops.linear(ops.rms_norm(self.layer_by_layer(), self.head.norm, self.norm_eps), self.head.weight)

    def layer_by_layer(self) -> Tensor:
        """The same by the operators for one layer each."""
        h, w, tokens = self.residual.clone(), self.weights, self.residual.shape[0]
        _, _, heads, kv_heads, head_dim = self.sizes

        def fp4(x: Tensor, matrix: ops.Fp4Tiles, i: int, bias: Tensor | None = None) -> Tensor:
            assert isinstance(w, ops.DecoderFp4Weights)
            of_matrix = matrix.codes[i], matrix.scale[i], 16, matrix.global_scale[i], bias
            return ops.fp4_linear(x, *of_matrix, tile_order=w.tile_order)

        cu_seqlens_q = torch.arange(tokens + 1, dtype=torch.int32, device=h.device)
        rows = self.rows
        for i in range(len(self.k_cache)):
            bias = w.qkv_bias[i] if w.qkv_bias else None
            if isinstance(w, ops.DecoderFp4Weights):
                qkv = fp4(ops.rms_norm(h, w.input_norm[i], self.norm_eps), w.qkv, i, bias)
            else:
                qkv = ops.rms_norm_linear(h, w.qkv[i], bias, self.norm_eps)
            qkv = qkv.view(tokens, -1, head_dim)
            q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
            caches = self.k_cache[i].clone(), self.v_cache[i].clone()
            ops.rope_kv_write(
                q, k, v, rows["cos_sin"], rows["positions"], rows["slot_mapping"], *caches,
                q_norm_weight=w.q_norm[i] if w.q_norm else None, k_norm_weight=w.k_norm[i] if w.k_norm else None,
            )  # fmt: skip
            out, _ = ops.paged_attention(
                q, *caches, cu_seqlens_q, rows["seqused_k"], rows["block_table"], 1, softmax_scale=head_dim**-0.5
            )
            if isinstance(w, ops.DecoderFp4Weights):
                h = (h.float() + fp4(out.flatten(1), w.out, i).float()).to(h.dtype)
                both = fp4(ops.rms_norm(h, w.mlp_norm[i], self.norm_eps), w.gate_up, i)
                x = ops.swiglu(both) if self.activation == "silu" else ops.geglu(both)
                h = (h.float() + fp4(x, w.down, i).float()).to(h.dtype)
                continue
            h = ops.linear(out.flatten(1), w.out[i], residual=h)
            x = ops.rms_norm_gated_linear(h, w.gate_up[i], None, self.activation, self.norm_eps)
            h = ops.linear(x, w.down[i], residual=h)
        return h

    def exact(self) -> Tensor:
        """In fp64, keys of the token itself not rounded."""
        h, w = self.residual.double(), self.dense or self.weights
        assert isinstance(w, ops.DecoderWeights)
        _, _, heads, kv_heads, head_dim = self.sizes
        cos, sin = self.rows["cos_sin"][self.rows["positions"].long()].double()[:, None].chunk(2, -1)
        half = head_dim // 2

        def norm(x: Tensor, eps: float) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

        def rotate(x: Tensor) -> Tensor:
            a, b = x[..., :half], x[..., half:]
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        for i in range(len(w.qkv)):
            qkv = norm(h, self.norm_eps) @ w.qkv[i].double().T
            if w.qkv_bias:
                qkv = qkv + w.qkv_bias[i].double()
            qkv = qkv.view(len(h), -1, head_dim)
            q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
            if w.q_norm:
                q, k = norm(q, 1e-6) * w.q_norm[i].double(), norm(k, 1e-6) * w.k_norm[i].double()
            q, k = rotate(q), rotate(k)
            out = torch.stack([self._attend(i, row, q[row], k[row], v[row]) for row in range(len(h))])
            h = h + out @ w.out[i].double().T
            both = (norm(h, self.norm_eps) @ w.gate_up[i].double().T).view(len(h), -1, 2, 8)
            gate, up = both.unbind(2)
            gate = (
                torch.nn.functional.silu(gate)
                if self.activation == "silu"
                else torch.nn.functional.gelu(gate, approximate="tanh")
            )
            h = h + (gate * up).flatten(1) @ w.down[i].double().T
        return h

    def _attend(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = int(self.rows["seqused_k"][row])
        if length == 0:
            return q.new_zeros(q.numel())
        block_size = self.k_cache[layer].shape[1]
        at = torch.arange(length, device=q.device)
        blocks = self.rows["block_table"][row][at // block_size].long()
        keys, values = (c[layer][blocks, at % block_size].double() for c in (self.k_cache, self.v_cache))
        keys[-1], values[-1] = k, v
        group = q.shape[0] // k.shape[0]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        p = (torch.einsum("hd,khd->hk", q, keys) * q.shape[1] ** -0.5).softmax(-1)
        return torch.einsum("hk,khd->hd", p, values).flatten()


# Layers, sizes, lengths and options: one to four tokens, with and without what a model may lack, every split of keys, padding.
CALLS: list[tuple[int, tuple[int, int, int, int, int], list[int], dict[str, Any]]] = [
    (30, SMOLLM2, [1000], {}),
    (2, SMOLLM2, [1], {}),
    (3, SMOLLM2, [1, 65, 0, 7001], {"block_size": 32}),
    (2, (4096, 14336, 32, 8, 128), [777], {}),
    (2, (4096, 14336, 32, 8, 128), [64, 129, 4000, 2], {}),
    (3, SMALL, [63, 128, 900], {"bias": True, "head_norms": True, "block_size": 8}),
    (3, SMALL, [2, 17], {"activation": "gelu_tanh", "block_size": 128}),
    (2, (2048, 8192, 32, 8, 64), [40, 300, 1, 2049], {}),
    (2, (1088, 1216, 4, 4, 128), [33], {}),
]


def few_calls(device: torch.device, dtype: torch.dtype) -> Iterator[DecodeCall]:
    """Those of few bytes, of two layers and also with a head."""
    for index, (_, sizes, lengths, options) in enumerate(CALLS):
        if sizes[0] <= 1088:
            call = make_call(device, dtype, 2, sizes, [min(n, 900) for n in lengths], seed=index, **options)
            yield call
            yield call.with_head(520)
            if dtype is torch.bfloat16 and sizes[4] == 128:
                yield call.in_fp4(16)
                yield call.in_fp4(8).with_head(520)


def make_call(
    device: torch.device,
    dtype: torch.dtype,
    num_layers: int,
    sizes: tuple[int, int, int, int, int],
    lengths: list[int],
    *,
    block_size: int = 16,
    bias: bool = False,
    head_norms: bool = False,
    activation: str = "silu",
    seed: int = 0,
) -> DecodeCall:
    """sizes: hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim. What no key lies in is NaN."""
    hidden, intermediate, heads, kv_heads, head_dim = sizes
    gen = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, generator=gen) * scale).to(dtype)

    rows = (heads + 2 * kv_heads) * head_dim
    layers = range(num_layers)
    weights = ops.DecoderWeights(
        qkv=[normal(rows, hidden, scale=hidden**-0.5) for _ in layers],
        out=[normal(hidden, heads * head_dim, scale=0.3 * (heads * head_dim) ** -0.5) for _ in layers],
        gate_up=[normal(2 * intermediate, hidden, scale=hidden**-0.5) for _ in layers],
        down=[normal(hidden, intermediate, scale=0.5 * intermediate**-0.5) for _ in layers],
        qkv_bias=[normal(rows, scale=0.3) for _ in layers] if bias else (),
        q_norm=[normal(head_dim) for _ in layers] if head_norms else (),
        k_norm=[normal(head_dim) for _ in layers] if head_norms else (),
    )
    pages = [-(-length // block_size) for length in lengths]
    num_blocks = sum(pages) + 2
    order = torch.randperm(num_blocks, device=device, generator=gen).int()
    block_table = torch.full((len(lengths), max(pages) + 1), 2**30, dtype=torch.int32, device=device)
    caches = [
        torch.full((num_blocks, block_size, kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
        for _ in range(2 * num_layers)
    ]
    slots, first = [], 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        block_table[row, :count] = order[first : first + count]
        at = torch.arange(length, device=device)
        blocks = block_table[row][at // block_size].long()
        for cache in caches:
            cache[blocks[:-1], at[:-1] % block_size] = normal(max(length - 1, 0), kv_heads, head_dim)
        slots.append(int(blocks[-1]) * block_size + (length - 1) % block_size if length else -1)
        first += count
    positions = torch.arange(max(lengths) + 1, device=device)[:, None]
    angles = positions * 10000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    to_int = {"dtype": torch.int32, "device": device}
    return DecodeCall(
        normal(len(lengths), hidden),
        weights,
        caches[:num_layers],
        caches[num_layers:],
        {
            "cos_sin": torch.cat((angles.cos(), angles.sin()), 1).float(),
            "positions": torch.tensor([max(length - 1, 0) for length in lengths], **to_int),
            "slot_mapping": torch.tensor(slots, **to_int),
            "seqused_k": torch.tensor(lengths, **to_int),
            "block_table": block_table,
        },
        sizes,
        activation,
    )
