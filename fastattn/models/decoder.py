"""What every decoder-only model shares: embedding, layers, final norm, LM head, rotary tables, weight loading."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch

from fastattn import nn, ops
from fastattn.models.config import ModelConfig
from fastattn.nn.shard import split_unit
from fastattn.reference import linear as reference

KVCache = Sequence[nn.LayerCache]
# What rows are drawn with, (n) each, as `ops.sample` takes it: temperature, top_k, top_p, min_p, seed, position.
Sampling = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Query heads to a KV head that one kernel has for prompts and for single tokens.
LARGEST_GROUP = 32


class DecoderLayer(nn.Module):
    """One block. ``x``: what the previous one left to add to the residual stream, which is added in place; where there is
    nothing, None, or what its norm takes. Returns that for the next one, and the stream. So each addition shares a kernel
    with the norm that follows it, or with the product in front of it.

    cache: the layer's `nn.LayerCache`."""

    @abstractmethod
    def forward(
        self,
        x: torch.Tensor | nn.NormInside | None,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        meta: nn.AttentionMetadata,
        *cache: torch.Tensor,
    ) -> tuple[torch.Tensor | nn.NormInside | None, torch.Tensor]: ...


class DecoderModel(nn.Module):
    """A causal language model over a paged KV cache.

    Subclasses give the layers. The two halves, hidden states and logits, are apart because only the last token of a
    sequence needs logits, and the vocabulary is the largest matrix of a small model.
    """

    packed_head: torch.Tensor | None = None

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[DecoderLayer],
        max_model_len: int,
        tp: nn.TensorParallel = nn.ALONE,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.embed_scale, tp)
        self.layers = torch.nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, shard=tp.shard(config.vocab_size))
        # Buffers, not weights: computed in fp32 on the CPU whatever the model's device and dtype are.
        with torch.device("cpu"):
            table = nn.rotary_table(config.rope, config.head_dim, max_model_len)
            local = nn.rotary_table(config.rope_local, config.head_dim, max_model_len) if config.rope_local else None
        self.register_buffer("cos_sin", table, persistent=False)
        self.register_buffer("cos_sin_local", local, persistent=False)

    def forward(
        self,
        token_ids: torch.Tensor,
        meta: nn.AttentionMetadata,
        kv_cache: KVCache,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """token_ids (T,) int32 → hidden states (T, hidden_size), final norm applied. drawn: see `nn.Embedding`."""
        x, residual = self.run_layers(self.embed_tokens(token_ids, drawn), meta, kv_cache)
        hidden: torch.Tensor = self.norm(x, residual) if isinstance(x, torch.Tensor) else self.norm(residual)
        return hidden

    def run_layers(
        self, residual: torch.Tensor, meta: nn.AttentionMetadata, kv_cache: KVCache
    ) -> tuple[torch.Tensor | nn.NormInside | None, torch.Tensor]:
        """residual (T, hidden_size), in place → what is still to be added to it, and the stream."""
        x: torch.Tensor | nn.NormInside | None = None
        for index, layer in enumerate(self.layers):
            is_local = self.cos_sin_local is not None and self.config.layer_is_sliding[index]
            table = self.cos_sin_local if is_local else self.cos_sin
            x, residual = layer(x, residual, table, meta, *kv_cache[index])
        return x, residual

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden (n, hidden_size) → logits (n, vocab_size) in its dtype, fp32 with a softcap; in ``out`` if given. On a rank
        other than 0 only that rank's part of them."""
        if self.lm_head is not None:
            logits = self.lm_head(hidden)
        elif self.packed_head is not None:
            logits = reference.packed_linear(hidden, self.packed_head, None, self.batch_invariant)
        else:
            logits = ops.linear(hidden, self.embed_tokens.weight, batch_invariant=self.batch_invariant)
        logits = self.tp.gather_columns(logits, self.config.vocab_size)
        if self.config.final_softcap:
            logits = logits.float()
            logits.div_(self.config.final_softcap).tanh_().mul_(self.config.final_softcap)
        return logits if out is None else out.copy_(logits)

    def decode(
        self,
        token_ids: torch.Tensor,
        meta: nn.AttentionMetadata,
        kv_cache: KVCache,
        drawn: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` and `logits` of a step whose tokens all want some."""
        return self.logits(self(token_ids, meta, kv_cache, drawn), out)

    def greedy(self, hidden: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """hidden (n, hidden_size) → (n) int32, the tokens that `ops.sample` gives of its `logits`, temperatures being 0; -1 for a
        row with a NaN or without a finite logit. On a rank other than 0 nothing that means anything."""
        weight = self._drawing_head
        if weight is None:
            return ops.sample(self.logits(hidden), *sampling)
        temperature, _, _, _, seed, position = sampling
        start = self.embed_tokens.shard.start
        token_ids, scores = ops.lm_head_sample(hidden, weight, temperature, seed, position, first_id=start)
        if self.tp.size == 1:
            return token_ids
        parts = self.tp.gather(torch.stack((token_ids, scores.view(torch.int32))))  # one exchange for both
        if not parts:
            return token_ids
        ids, bits = torch.stack(parts, 1)  # (ranks, n) each
        # The first of the largest, and a NaN before all, as where the head is whole.
        best = bits.view(torch.float32).argmax(0, keepdim=True)
        return ids.gather(0, best)[0]

    @property
    def _drawing_head(self) -> torch.Tensor | None:
        """The head's weight, or this rank's rows of it, if tokens are drawn from it without logits: plain numbers, multiplied as
        `ops.linear` does for any number of rows, with nothing behind that could make equals of two logits."""
        plain = self.packed_head is None if self.lm_head is None else self.lm_head.is_plain
        # A shard's first id must be a multiple of four.
        even = split_unit(self.config.vocab_size, self.tp.size) % 4 == 0
        if not plain or not even or self.batch_invariant or self.config.final_softcap:
            return None
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def decode_greedy(
        self,
        token_ids: torch.Tensor,
        meta: nn.AttentionMetadata,
        kv_cache: KVCache,
        drawn: torch.Tensor | None,
        sampling: Sampling,
    ) -> torch.Tensor:
        """`forward` and `greedy` of a step whose tokens all want one."""
        if self._is_all_one_kernel(token_ids.shape[0], meta, kv_cache):
            # Two kernels, where a head that draws would be the fourth and the fifth, behind embeddings, layers and a norm.
            return ops.sample(self.decode(token_ids, meta, kv_cache, drawn), *sampling)
        return self.greedy(self(token_ids, meta, kv_cache, drawn), sampling)

    def _is_all_one_kernel(self, num_tokens: int, meta: nn.AttentionMetadata, kv_cache: KVCache) -> bool:
        """Whether `decode` of this step is one kernel, its logits among the rest."""
        return False

    def make_batch_invariant(self) -> None:
        """From now on a token's hidden states and logits have the same bits in every step, as long as attention's queries come as
        `query_groups` has them. Before the weights are loaded. Raises ValueError for a model that cannot be so."""
        group = self.config.num_heads // self.config.num_kv_heads
        if group > LARGEST_GROUP:
            raise ValueError(
                f"batch_invariant is True with {group} query heads to a KV head, allowed are up to {LARGEST_GROUP}"
            )
        if self.tp.size > 1:
            raise ValueError(
                f"batch_invariant is True with tensor_parallel_size {self.tp.size}, allowed is 1: the order in which ranks' "
                "results are added depends on the size of a step"
            )
        for name, layer in self.named_modules():
            if isinstance(layer, nn.QuantizedWeight) and not layer.can_be_batch_invariant:
                raise ValueError(
                    f"batch_invariant is True with {type(layer).__name__} at {name}, allowed are weights in 16 bits, INT8 and FP8 "
                    "with scales of rows"
                )
            if isinstance(layer, nn.Module):
                layer.batch_invariant = True

    @property
    def num_kv_heads(self) -> int:
        """This rank's, of each layer."""
        return self.tp.shard_heads(self.config.num_heads, self.config.num_kv_heads)[1].length

    def pack(self) -> None:
        """Lays the loaded weights out for the CPU's matrix kernels. A tied head becomes a second copy: rows of the first are
        the embeddings."""
        for name, layer in self.linears():
            layer.pack(name)
        if self.lm_head is None and reference.can_pack(self.embed_tokens.weight):
            self.packed_head = reference.pack(self.embed_tokens.weight)

    @property
    def num_parameters(self) -> int:
        """Numbers that the weights are, however they are stored; scales and zero points are none."""
        quantized = [m for m in self.modules() if isinstance(m, nn.QuantizedWeight)]
        stored = sum(w.numel() for m in quantized for w in m.parameters())
        return sum(w.numel() for w in self.parameters()) - stored + sum(m.rows * m.columns for m in quantized)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """(name, layer) of each linear layer, named as in the checkpoint; of merged ones, as if they were in it."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear) and ".separate." not in name:
                yield (name if name == "lm_head" else f"model.{name}"), layer

    def weights(self, prefix: str = "") -> nn.Weights:
        yield from self.embed_tokens.weights("model.embed_tokens.")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Module)
            yield from layer.weights(f"model.layers.{index}.")
        yield from self.norm.weights("model.norm.")
        if self.lm_head is not None:
            yield from self.lm_head.weights("lm_head.")
