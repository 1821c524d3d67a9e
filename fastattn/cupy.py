"""Attention over CuPy arrays, and over any other arrays that speak DLPack."""

from fastattn.integrations.cupy import call, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

__all__ = ["call", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
