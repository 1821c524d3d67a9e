"""A model one layer at a time: its weights are read, text flows through it, and it is let go again.

So calibration needs the memory of one layer and of the text's hidden states, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import nn
from fastattn.models.decoder import DecoderLayer, DecoderModel
from fastattn.models.loader import ModelSource
from fastattn.models.registry import build_model

# Tokens in a forward pass: enough to keep a matrix product busy, little enough for a laptop.
_STEP_TOKENS = 2048
_BLOCK = 16


@dataclass(frozen=True)
class Product:
    """One matrix product of a layer: a checkpoint's linear layer, or several that are stacked because they share their input.

    path: of the module in the layer ("self_attn.qkv_proj"). names: of the layers in the checkpoint, without ".weight".
    """

    path: str
    names: tuple[str, ...]

    def stack(self, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([weights[f"{name}.weight"] for name in self.names])

    def split(self, stacked: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name → its rows of something that has a row for each of the stack's."""
        rows = [weights[f"{name}.weight"].shape[0] for name in self.names]
        return dict(zip(self.names, torch.split(stacked, rows), strict=True))


class LayerWalk:
    """Holds the model without memory for its weights, and gives each layer its weights while it is needed."""

    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype, length: int) -> None:
        """length: tokens in a window. dtype: of hidden states and weights; fp32, but on a GPU, whose kernels want 16 bits."""
        self.source, self.config, self.device, self.dtype = source, source.config, device, dtype
        self.length = length
        self._meta: DecoderModel = build_model(self.config, torch.device("meta"), dtype, length)
        head_dim, local = self.config.head_dim, self.config.rope_local
        self._table = nn.rotary_table(self.config.rope, head_dim, length).to(device)
        self._local = nn.rotary_table(local, head_dim, length).to(device) if local is not None else None

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def prefix(self, index: int) -> str:
        return f"model.layers.{index}."

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Layer ``index`` with memory for its weights, which are not read yet; see `fill`."""
        layer = self._meta.layers[index]
        assert isinstance(layer, DecoderLayer)
        layer.to_empty(device=self.device)
        try:
            yield layer
        finally:
            layer.to_empty(device="meta")

    def read(self, index: int) -> dict[str, Tensor]:
        """The layer's weights by their names, fp32, as the network multiplies with them."""
        layer = self._meta.layers[index]
        assert isinstance(layer, DecoderLayer)
        found = {}
        for name, out, *_ in layer.weights(self.prefix(index)):
            found[name] = torch.empty(out.shape, device=self.device)
            read_weight(self.source, name, found[name])
        return found

    def read_top(self, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
        """The weights outside the layers whose names begin so, fp32."""
        found = {}
        for name, out, *_ in self._meta.weights():
            if name.startswith(prefixes):
                found[name] = torch.empty(out.shape)
                read_weight(self.source, name, found[name])
        return found

    def fill(self, layer: DecoderLayer, index: int, values: Mapping[str, Tensor]) -> None:
        for name, out, *_ in layer.weights(self.prefix(index)):
            out.copy_(values[name])

    def products(self, index: int) -> list[Product]:
        """The layer's matrix products, in the order in which they are computed."""
        found = []
        for path, module in self._meta.layers[index].named_modules():
            if isinstance(module, nn.Linear):
                names = [
                    name for name, *_ in module.weights(f"{self.prefix(index)}{path}.") if name.endswith(".weight")
                ]
                found.append(Product(path, tuple(name.removesuffix(".weight") for name in names)))
        return found

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (n, length) → hidden states (n, length, hidden_size)."""
        embedding = self._meta.embed_tokens
        embedding.to_empty(device=self.device)
        read_weight(self.source, "model.embed_tokens.weight", embedding.weight)
        flat = tokens.to(self.device, torch.int32).flatten()
        states: Tensor = embedding(flat).view(*tokens.shape, -1)
        embedding.to_empty(device="meta")
        return states

    @torch.inference_mode()
    def run(
        self,
        layer: DecoderLayer,
        index: int,
        states: Tensor,
        observe: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Tensor:
        """Hidden states (n, length, hidden_size) before the layer → after it.

        observe: path of a linear layer → called with each of its inputs, (tokens, in_features).
        """
        hooks = [
            layer.get_submodule(path).register_forward_pre_hook(lambda _, inputs, see=see: see(inputs[0]))
            for path, see in (observe or {}).items()
        ]
        try:
            out = torch.empty_like(states)
            rows = max(1, _STEP_TOKENS // self.length)
            for start in range(0, states.shape[0], rows):
                out[start : start + rows] = self._step(layer, index, states[start : start + rows])
            return out
        finally:
            for hook in hooks:
                hook.remove()

    def _step(self, layer: DecoderLayer, index: int, states: Tensor) -> Tensor:
        count, length, hidden = states.shape
        is_local = self._local is not None and self.config.layer_is_sliding[index]
        table = self._local if is_local else self._table
        c = self.config
        meta, caches = window_cache(
            c.num_kv_heads, c.head_dim, count, length, self.device, nn.KVCacheFormat(self.dtype), 1
        )
        residual = states.reshape(-1, hidden).clone()  # the layer adds its attention into it
        out, residual = layer(None, residual, table, meta, *caches[0])
        return (residual + out if isinstance(out, Tensor) else residual).view(count, length, hidden)


def read_weight(source: ModelSource, name: str, out: Tensor) -> None:
    """Reads a tensor as the network multiplies with it: Gemma's norms with the 1 that its checkpoints leave out.

    Raises ValueError for numbers that are not finite: rounded or trained, they would spoil the model without a word.
    """
    source.read(name, out)
    if not out.isfinite().all():
        raise ValueError(f"{source.name}: tensor {name} holds numbers that are not finite")
    if source.config.norm_plus_one and name.endswith("norm.weight"):
        out.add_(1)


def window_cache(
    num_kv_heads: int,
    head_dim: int,
    count: int,
    length: int,
    device: torch.device,
    form: nn.KVCacheFormat,
    num_layers: int,
    static_scales: Tensor | None = None,
) -> tuple[nn.AttentionMetadata, list[nn.LayerCache]]:
    """A KV cache for ``count`` texts of ``length`` tokens that are computed in one pass, and where each token stands in it."""
    blocks = -(-length // _BLOCK)

    def ints(values: Tensor) -> Tensor:
        return values.to(device, torch.int32)

    position = torch.arange(length)
    text = torch.arange(count)
    meta = nn.AttentionMetadata(
        positions=ints(position.repeat(count)),
        slot_mapping=ints((text[:, None] * blocks * _BLOCK + position).flatten()),
        cu_seqlens_q=ints(torch.arange(count + 1) * length),
        seqused_k=ints(torch.full((count,), length)),
        block_table=ints(text[:, None] * blocks + torch.arange(blocks)),
        max_seqlen_q=length,
        mixes_keys=form.mixes_keys,
    )
    memory = nn.KVMemory(form, num_layers, count * blocks, _BLOCK, num_kv_heads, head_dim, device, static_scales)
    return meta, memory.layers
