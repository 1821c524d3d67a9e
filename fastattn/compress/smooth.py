"""SmoothQuant (Xiao et al., 2023): large activations are divided, and the weights they meet multiplied, so that eight bits hold both.

x W = (x / s)(s W) with s_j = max|x_j|ᵅ / max|W_j|¹⁻ᵅ. The division is folded into what makes x: the norm before it, the rows of v
before the output projection (attention is linear in v), the rows of up before the down projection (the gated product is linear
in up). Nothing is computed at run time for it. Where a KV cache has static scales, v stays as it is: they are for its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastattn.compress.walk import Product
from fastattn.models.config import ModelConfig

_LEAST = 1e-5


def smoothing_factors(amax: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s (K,) from the largest inputs (K,) and the weight (N, K). 1 where a column never sees anything."""
    factors = amax.clamp(min=_LEAST) ** alpha / weight.abs().amax(0).clamp(min=_LEAST) ** (1 - alpha)
    return torch.where(amax > 0, factors.clamp(min=_LEAST), torch.ones_like(factors))


def smooth_layer(
    weights: dict[str, Tensor],
    products: Sequence[Product],
    amax: Mapping[str, Tensor],
    config: ModelConfig,
    alpha: float,
    store_norm: Callable[[str, Tensor], Tensor],
    keep_values: bool = False,
) -> dict[str, Tensor]:
    """Folds factors into a layer's weights, in place in the dict. amax: a product's path → its largest inputs (K,).

    store_norm(name, weight) → the norm weight as it will be read back: what rounding it to the file's type changes is put
    into the factors, so the product stays exact. keep_values: v is not to change. Returns path → factors (K,), by which the inputs have become smaller.
    """
    by_path = {product.path: product for product in products}
    prefix = products[0].names[0].split("self_attn.")[0]
    before_mlp = f"{prefix}pre_feedforward_layernorm.weight"
    if before_mlp not in weights:
        before_mlp = f"{prefix}post_attention_layernorm.weight"
    norms = {"self_attn.qkv_proj": f"{prefix}input_layernorm.weight", "mlp.gate_up_proj": before_mlp}
    found: dict[str, Tensor] = {}
    for path, norm in norms.items():
        product = by_path[path]
        wanted = smoothing_factors(amax[path], product.stack(weights), alpha)
        smaller = store_norm(norm, weights[norm] / wanted)
        factors = torch.where(smaller != 0, weights[norm] / smaller, torch.ones_like(wanted))
        weights[norm] = torch.where(smaller != 0, smaller, weights[norm])
        _multiply_columns(weights, product, factors)
        found[path] = factors
    groups = config.num_heads // config.num_kv_heads
    for path, before, repeat in (("self_attn.o_proj", "self_attn.v_proj", groups), ("mlp.down_proj", "mlp.up_proj", 1)):
        if keep_values and before == "self_attn.v_proj":
            continue
        product = by_path[path]
        # Query heads of a group share one head of v, so they share its factors: (KV head, query head in group, dim).
        size = config.head_dim if repeat > 1 else 1
        seen = amax[path].view(-1, repeat, size).amax(1).flatten()
        weight = product.stack(weights).abs().amax(0).view(-1, repeat, size).amax(1).flatten()
        factors = smoothing_factors(seen, weight[None], alpha)
        for name in (f"{prefix}{before}.weight", f"{prefix}{before}.bias"):
            if name in weights:
                weights[name] = weights[name] / (factors[:, None] if weights[name].dim() == 2 else factors)
        spread = factors.view(-1, 1, size).expand(-1, repeat, size).flatten()
        _multiply_columns(weights, product, spread)
        found[path] = spread
    return found


def _multiply_columns(weights: dict[str, Tensor], product: Product, factors: Tensor) -> None:
    for name in product.names:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * factors
