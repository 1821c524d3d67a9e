"""The layers that every model is composed of; no model names here."""

from fastattn.nn.attention import Attention, AttentionMetadata
from fastattn.nn.embedding import Embedding
from fastattn.nn.linear import Linear, MergedLinear
from fastattn.nn.mlp import GatedMLP
from fastattn.nn.module import Module, Weights
from fastattn.nn.norm import RMSNorm
from fastattn.nn.rotary import rotary_table

__all__ = [
    "Attention",
    "AttentionMetadata",
    "Embedding",
    "GatedMLP",
    "Linear",
    "MergedLinear",
    "Module",
    "RMSNorm",
    "Weights",
    "rotary_table",
]
