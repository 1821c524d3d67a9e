"""Tools that make models cheaper: quantize, prune, distill, evaluate, inspect."""

from fastattn.compress.distill import DistillOptions, distill
from fastattn.compress.evaluate import EvalOptions, Evaluation, evaluate
from fastattn.compress.inspection import Inspection, inspect_model
from fastattn.compress.prune import PruneOptions, prune
from fastattn.compress.quantize import QuantizeOptions, quantize
from fastattn.compress.receipt import read_receipt
from fastattn.compress.rewrite import CalibrationOptions

__all__ = [
    "CalibrationOptions",
    "DistillOptions",
    "EvalOptions",
    "Evaluation",
    "Inspection",
    "PruneOptions",
    "QuantizeOptions",
    "distill",
    "evaluate",
    "inspect_model",
    "prune",
    "quantize",
    "read_receipt",
]
