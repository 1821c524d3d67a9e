"""`attn_implementation="fastattn"` in Hugging Face transformers: importing this module registers it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastattn.integrations import flash_attn
from fastattn.integrations._common import cut, fit, length, no_dropout, offsets
from fastattn.integrations._kv_cache import cached_attention
from fastattn.integrations.bert_padding import index_first_axis, pad_input, unpad_input
from fastattn.ops.attention import batch_attention, varlen_attention

NAME = "fastattn"
# transformers' continuous batching takes only names with "flash" in them, and its fast decode path only with a 2 or 3
# behind that.
CONTINUOUS_NAME = "fastattn_flash_2"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    block_table: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    deterministic: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a model's attention layer calls.

    module: the layer. query: (B, H, Sq, D). key: (B, Hk, Sk, D). value: (B, Hk, Sk, Dv).
    attention_mask: None; (B, ≤ Sk) with 1 where a key is a token, whose last Sq columns are the queries'; or (B, 1, Sq, Sk),
      which torch's own attention runs.
    scaling: 1/√D if None. dropout: 0. softcap: as in `fastattn.flash_attn_func`.
    sliding_window: how many keys a query sees, itself included. is_causal: the layer's own if None.
    s_aux: (H), attention sinks, with gradient.
    position_ids: (B, S); where they jump, another sequence begins.
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences in one row, as of a collator without padding; the
      lengths may be 0-d tensors.
    block_table, k_cache, v_cache: a paged cache to append to, from continuous batching.
    deterministic: of the gradients.

    Returns (B, Sq, H, Dv) and None.
    """
    op = "attn_implementation='fastattn'"
    if dropout > 0:
        no_dropout(f"{op} (attention_dropout in the model's config)", dropout)
    if kwargs.get("output_attentions"):
        warnings.warn(f"{op}: output_attentions gives nothing; use attn_implementation='eager' for it", stacklevel=2)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and attention_mask.dim() == 4:
        return _by_torch(module, query, key, value, attention_mask, scaling, softcap, s_aux)

    q, k, v = _same_dtype(module, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    head_dim = v.shape[-1]
    options: dict[str, Any] = {
        "softmax_scale": q.shape[-1] ** -0.5 if scaling is None else scaling,
        "causal": causal,
        "window_size": (-1, -1),
        "softcap": softcap or 0.0,
    }
    if sliding_window is not None:
        options["window_size"] = (sliding_window - 1, sliding_window - 1)
    if block_table is not None and k_cache is not None and v_cache is not None and cu_seq_lens_k is not None:
        return _append_and_attend(q, k, v, k_cache, v_cache, block_table, cu_seq_lens_k, s_aux, options), None

    options |= {"sinks": s_aux, "deterministic": deterministic}
    if attention_mask is not None:
        return cut(_padded(fit(q), fit(k), fit(v), attention_mask, options), head_dim), None
    if cu_seq_lens_q is None and position_ids is not None:
        cu_seq_lens_q = _starts(position_ids, q, k)
        if cu_seq_lens_q is not None:
            cu_seq_lens_k = cu_seq_lens_q
            max_length_q = max_length_k = int(cu_seq_lens_q.diff().max())
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        out, _ = batch_attention(fit(q), fit(k), fit(v), **options)
        return cut(out, head_dim), None
    rows = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    out = _varlen(*rows, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options)
    return cut(out, head_dim).view(*q.shape[:3], head_dim), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `attention_forward` gets: None where nothing but causality and windows masks, (B, ≤ kv_length) where
    there is padding or a cache with free places, and a whole mask where the model has a mask of its own.

    The arguments are those of transformers' mask functions.
    """
    chunk = getattr(kwargs.get("config"), "attention_chunk_size", None)
    chunked = chunk is not None and kwargs.get("local_size") == chunk and kv_length + kv_offset > chunk
    if mask_function is not None and (use_vmap or chunked):  # an overlay, as for the tokens of an image, or Llama 4's
        whole: Tensor | None = sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=int(q_offset), kv_offset=int(kv_offset),
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
            allow_is_causal_skip=False,
        )  # fmt: skip
        return whole
    if attention_mask is None:
        if "allow_is_bidirectional_skip" in kwargs:  # an encoder, or its keys: all of them are there
            return None
        # transformers drops a mask of ones, but a static cache has places behind the last key.
        used = int(q_offset) + q_length - int(kv_offset)
        return None if used >= kv_length else torch.ones(batch_size, used, dtype=torch.bool, device=device)
    attention_mask = attention_mask[:, -kv_length:]
    if attention_mask.shape[1] == kv_length and bool(attention_mask.all()):
        return None
    return attention_mask


def register() -> None:
    """Make "fastattn" known to transformers. Importing `fastattn.integrations.transformers` has done so."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    AttentionInterface.register(f"paged|{NAME}", attention_forward)
    AttentionInterface.register(CONTINUOUS_NAME, attention_forward)
    AttentionMaskInterface.register(CONTINUOUS_NAME, attention_mask)
    _serve_lazy_imports()


def _serve_lazy_imports() -> None:
    """Continuous batching asks transformers for the functions behind a name with "flash" in it, and transformers looks for
    them on the hub; for our name it gets ours."""
    original = getattr(flash_utils, "_lazy_imports", None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def lazy_imports(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        if implementation == CONTINUOUS_NAME:
            functions = (
                flash_attn.flash_attn_func,
                flash_attn.flash_attn_varlen_func,
                flash_attn.flash_attn_with_kvcache,
            )
            return (*functions, pad_input, unpad_input)
        return original(implementation, *args, **kwargs)

    flash_utils._lazy_imports = lazy_imports


def _by_torch(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> tuple[Tensor, None]:
    for name, given in (("softcap", softcap), ("s_aux", s_aux)):
        if given is not None:
            raise ValueError(
                f"attn_implementation='fastattn': attention_mask has shape {tuple(mask.shape)} and {name} is given, "
                "expected a mask (B, S) or None; use attn_implementation='eager'"
            )
    warnings.warn(
        f"attn_implementation='fastattn': a whole attention_mask {tuple(mask.shape)} goes to torch's own attention, which "
        "is slower; a mask (B, S) does not",
        stacklevel=3,
    )
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)


def _same_dtype(module: torch.nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Norms and adapters that are kept in fp32 give fp32; the layer's own dtype is what attention runs in."""
    if all(t.dtype != torch.float32 for t in tensors):
        return tensors
    device = tensors[0].device.type
    config = getattr(module, "config", None)
    linear = next((m for m in module.modules() if isinstance(m, torch.nn.Linear)), None)
    if torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
    elif hasattr(config, "_is_quantized") or linear is None:
        target = getattr(config, "dtype", None) or torch.float32
    else:
        target = linear.weight.dtype
    return tuple(t.to(target) for t in tensors)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    options: dict[str, Any],
) -> Tensor:
    starts_q, starts_k = (cu.to(torch.int32) for cu in (cu_seqlens_q, cu_seqlens_k))
    longest_q, longest_k = length(max_seqlen_q, q.shape[0]), length(max_seqlen_k, k.shape[0])
    out, _ = varlen_attention(fit(q), fit(k), fit(v), starts_q, starts_k, longest_q, longest_k, **options)
    return out


def _padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """q (B, Sq, H, D), k and v (B, Sk, Hk, D), mask (B, ≤ Sk) → (B, Sq, H, D), 0 where a query is padding."""
    (batch, num_queries), num_keys = q.shape[:2], min(k.shape[1], mask.shape[1])
    mask, k, v = mask[:, -num_keys:], k[:, :num_keys], v[:, :num_keys]  # a static cache has places behind its keys
    if bool(mask.all()):
        return batch_attention(q, k, v, **options)[0]
    keys, indices, cu_seqlens_k, longest_k, _ = unpad_input(k, mask)
    values = index_first_axis(v.flatten(0, 1), indices)
    if num_queries == 1 or not (options["causal"] or options["window_size"] != (-1, -1)):
        # No query's place matters: each sees all keys of its sequence, and the mask may be another's, an encoder's.
        cu_seqlens_q = offsets(batch, num_queries, q.device)
        rows = q.flatten(0, 1)
        return _varlen(rows, keys, values, cu_seqlens_q, cu_seqlens_k, num_queries, longest_k, options).view(
            batch, num_queries, q.shape[2], v.shape[3]
        )
    cu_seqlens_q, longest_q = cu_seqlens_k, longest_k
    if num_queries == num_keys:
        rows = index_first_axis(q.flatten(0, 1), indices)
    else:
        rows, indices, cu_seqlens_q, longest_q, _ = unpad_input(q, mask[:, -num_queries:])
    out = _varlen(rows, keys, values, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, options)
    return pad_input(out, indices, batch, num_queries)


def _starts(position_ids: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
    """cu_seqlens of the sequences in q (B, S, H, D), which begin where positions jump; None if none does."""
    batch, num_queries = q.shape[:2]
    if position_ids.dim() != 2 or position_ids.shape[1] != num_queries or k.shape[1] != num_queries or num_queries == 1:
        return None  # a step of decoding, or positions of another kind
    jumps = position_ids.diff(dim=1) != 1
    if torch.compiler.is_compiling():
        # Reading it would break the graph. Compiled, packed sequences come with cu_seq_lens_q, and this holds to it.
        torch._assert_async(
            jumps.logical_not().all(), "fastattn: packed position_ids in a compiled model need cu_seq_lens"
        )
        return None
    if not bool(jumps.any()):
        return None
    starts = F.pad(jumps.expand(batch, -1), (1, 0), value=True).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=batch * num_queries).to(torch.int32)


def _append_and_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """One new token of each sequence: q (1, B, H, D), k and v (1, B, Hk, D); their keys so far are in the cache."""
    rows, keys, values = (t.reshape(-1, 1, *t.shape[-2:]) for t in (q, k, v))
    before = cu_seqlens_k.diff()[: keys.shape[0]] - 1
    out, _ = cached_attention(
        "attn_implementation='fastattn'", rows, k_cache, v_cache, keys, values, None, None, before, None, None,
        block_table, options["softmax_scale"], options["causal"], options["window_size"], options["softcap"], False,
        sinks=sinks,
    )  # fmt: skip
    return out.view(*q.shape[:2], *out.shape[-2:])


register()
