"""The paged KV cache: in which numbers keys and values are kept, and the memory for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn.reference.kv_8bit import LARGEST

# What a layer reads and writes: k_cache, v_cache (num_blocks, block_size, num_kv_heads, head_dim) and, if they are of 8 bits,
# k_scale, v_scale fp32: (num_blocks, block_size, num_kv_heads), or (num_kv_heads) if they are static.
LayerCache = tuple[torch.Tensor, ...]

# vLLM's names; "auto" is the model's dtype here, where what a checkpoint asks for is decided already.
_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_per_token_head": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int8_per_token_head": torch.int8,
}

# By how much later tokens may exceed those that static scales were calibrated on. An e4m3 number keeps its 3 bits of mantissa
# over 15 powers of two, so room costs it nothing; int8's steps grow with it.
_HEAD_ROOM = {torch.float8_e4m3fn: 2.0, torch.int8: 1.25}


@dataclass(frozen=True)
class KVCacheFormat:
    """dtype: the model's, or float8_e4m3fn or int8 with scales.

    static_scales False: one for each token's head, which is written with it: so nothing is calibrated, no token is out of range,
    and what a token leaves in the cache depends on that token alone. True: one for each KV head of a layer, fixed before
    anything is written. calibrated: those are set from the first tokens that are written, and not by a checkpoint or a file.
    """

    dtype: torch.dtype
    static_scales: bool = False
    calibrated: bool = False

    @property
    def is_8bit(self) -> bool:
        return self.dtype in LARGEST

    @property
    def has_token_scales(self) -> bool:
        return self.is_8bit and not self.static_scales

    @property
    def mixes_keys(self) -> bool:
        """Keys, and queries with them, are multiplied by a Hadamard matrix before they are rounded. A checkpoint's scales and a
        file's are for keys as they are."""
        return self.is_8bit and (self.calibrated or not self.static_scales)

    def bytes_per_token(self, num_layers: int, num_kv_heads: int, head_dim: int) -> int:
        return num_layers * 2 * num_kv_heads * (head_dim * self.dtype.itemsize + 4 * self.has_token_scales)

    def static_bytes(self, num_layers: int, num_kv_heads: int) -> int:
        return num_layers * 2 * num_kv_heads * 4 * self.static_scales


def check_kv_cache_dtype(name: str) -> None:
    if name not in _DTYPES:
        raise ValueError(f"kv_cache_dtype is {name!r}, allowed are {', '.join(map(repr, _DTYPES))}")


def check_kv_cache_scales(scales: str, name: str) -> None:
    """scales, name: the options kv_cache_scales and kv_cache_dtype. Scales that are "auto" are for the model to decide."""
    check_kv_cache_dtype(name)
    if scales in ("auto", "dynamic", "checkpoint", "calculate") or scales.endswith(".safetensors"):
        takes_static = _DTYPES[name] in LARGEST and not name.endswith("_per_token_head")
        if scales not in ("auto", "dynamic") and not takes_static:
            raise ValueError(
                f"kv_cache_scales is {scales!r} with kv_cache_dtype {name!r}, allowed is 'dynamic' there; "
                "static scales are for kv_cache_dtype 'fp8' and 'int8'"
            )
        return
    raise ValueError(
        f"kv_cache_scales is {scales!r}, allowed are 'dynamic', 'checkpoint', 'calculate' and a file's name that ends in "
        ".safetensors, or 'auto'"
    )


def kv_cache_format(name: str, dtype: torch.dtype, head_dim: int, scales: str = "dynamic") -> KVCacheFormat:
    """name, scales: the options kv_cache_dtype and kv_cache_scales. dtype, head_dim: the model's."""
    check_kv_cache_scales(scales, name)
    form = KVCacheFormat(_DTYPES[name] or dtype, static_scales=scales != "dynamic", calibrated=scales == "calculate")
    if not form.is_8bit and form.dtype is not dtype:
        model = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"kv_cache_dtype is {name!r} for a model in {model}, allowed are 'auto', {model!r}, 'fp8' and 'int8'"
        )
    if form.is_8bit and head_dim % 16 != 0:
        raise ValueError(f"kv_cache_dtype is {name!r} with head_dim {head_dim}, allowed is head_dim a multiple of 16")
    return form


def calibrated_scale(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The static scales, (Hk) fp32, of a cache in ``dtype`` for keys or values like those of seen (T, Hk, D): their largest
    magnitude with head room; 1 for zeros. Numbers that are not finite are a broken request's and do not count."""
    magnitudes = seen.abs()
    largest = magnitudes.where(magnitudes.isfinite(), 0.0).amax((0, 2)).float()
    return torch.where(largest == 0, 1.0, largest * (_HEAD_ROOM[dtype] / LARGEST[dtype]))


class KVMemory:
    """The cache of all layers. Uninitialized on purpose: no operator reads a slot that was not written.

    scales: fp32, of tokens (num_layers, 2, num_blocks, block_size, num_kv_heads), or static (num_layers, 2, num_kv_heads), ones
    until they are known; None if there are none. What a block consists of, of all layers at once, so that a call that moves
    blocks has one tensor or two to look at: by_token (num_blocks, block_size, 2 * num_layers, width), for a block's
    beginning, and by_layer (num_blocks, 2 * num_layers, block_size, width), for all of it.
    """

    def __init__(
        self,
        form: KVCacheFormat,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        static_scales: torch.Tensor | None = None,
    ) -> None:
        """static_scales: those to use, in place if they are on the device."""
        self.form = form
        # Layout, here and nowhere else: (layer, k or v, block, token in block, KV head, head dim), scales without the last.
        slots = (num_layers, 2, num_blocks, block_size, num_kv_heads)
        self.values = torch.empty((*slots, head_dim), dtype=form.dtype, device=device)
        self.scales: torch.Tensor | None = None
        if form.static_scales:
            known = torch.ones(num_layers, 2, num_kv_heads) if static_scales is None else static_scales
            self.scales = known.to(device)
        elif form.is_8bit:
            self.scales = torch.empty(slots, dtype=torch.float32, device=device)
        self.layers: list[LayerCache] = [
            (*self.values[i], *(() if self.scales is None else self.scales[i])) for i in range(num_layers)
        ]
        stacked = [self.values.flatten(4).flatten(0, 1)]
        if form.has_token_scales and self.scales is not None:
            stacked.append(self.scales.flatten(0, 1))
        self.by_token = [tensor.permute(1, 2, 0, 3) for tensor in stacked]
        self.by_layer = [tensor.transpose(0, 1) for tensor in stacked]

    def release(self) -> None:
        """Gives the blocks' memory back, with what is in it; the tensors stay, and must not be used until `restore`."""
        for tensor in self._of_blocks:
            tensor.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Takes the memory again, uninitialized. Static scales were there all the time."""
        for tensor in self._of_blocks:
            tensor.untyped_storage().resize_(tensor.nbytes)

    @property
    def _of_blocks(self) -> list[torch.Tensor]:
        return [self.values, *([self.scales] if self.scales is not None and self.form.has_token_scales else [])]

    @property
    def nbytes(self) -> int:
        """Of the blocks."""
        return sum(tensor.nbytes for tensor in self.by_layer)

    def on_host(self, num_blocks: int) -> list[torch.Tensor]:
        """Host memory for so many blocks, like `by_layer`."""
        shapes = [(tensor.shape[1], num_blocks, *tensor.shape[2:]) for tensor in self.by_layer]
        return [
            torch.empty(shape, dtype=tensor.dtype).transpose(0, 1)
            for shape, tensor in zip(shapes, self.by_layer, strict=True)
        ]
