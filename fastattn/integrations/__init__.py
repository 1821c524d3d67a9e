"""Other packages' attention interfaces over `fastattn.ops`: flash-attn 2 and 3, torch's SDPA, transformers, vLLM, CuPy."""
