"""Inputs, oracles, comparison and the table of operators that the operator tests share."""
