"""Speculative decoding: proposers of draft tokens, and the rule that accepts them."""
