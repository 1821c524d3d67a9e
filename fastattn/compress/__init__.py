"""Tools that make models cheaper: quantize, prune, distill, evaluate, inspect."""
