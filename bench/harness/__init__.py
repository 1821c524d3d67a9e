"""Timing, ceilings, peers, correctness and reports; what the families share."""
