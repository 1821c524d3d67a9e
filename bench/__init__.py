"""Benchmarks: `python -m bench FAMILY…` checks and times our operators and engine beside what a user would pick instead."""
