"""flash-attn's `bert_padding`: from padded batches to packed tokens and back, differentiable.

Each function gives what flash-attn 2.8's function of that name gives. Finding the tokens of a mask waits for the GPU,
here as there: their number is the size of a result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of a tensor.

    input: (N, ...). indices: (n) int64, rows of it.

    Returns (n, ...).
    """
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Rows to their places among zeros.

    values: (n, ...). indices: (n) int64, distinct. first_axis_dim: N.

    Returns (N, ...).
    """
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch in one row.

    hidden_states: (B, S, ...). attention_mask: (B, S), 1 for a token and 0 for padding, bool or int.
    unused_mask: (B, S), 1 for what is kept in the row without being used.

    Returns the tokens (T, ...); their indices (T) in the flat batch; cu_seqlens (B + 1) int32; the longest sequence;
    and how many tokens of each sequence are used, (B) int32.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a batch whose rows hold several sequences each.

    hidden_states: (B, S, ...). attention_mask_in_length: (B, S) int, the lengths of a row's sequences from its left end,
      then zeros.

    Returns the tokens (T, ...); their indices (T) in the flat batch; cu_seqlens int32 over all sequences; the longest.
    """
    filled = attention_mask_in_length.sum(-1, keepdim=True)
    position = torch.arange(attention_mask_in_length.shape[1], device=filled.device)
    indices = (position < filled).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens back in their padded batch, zeros elsewhere.

    hidden_states: (T, ...). indices: (T) int64, from `unpad_input`. batch, seqlen: B and S.

    Returns (B, S, ...).
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])
