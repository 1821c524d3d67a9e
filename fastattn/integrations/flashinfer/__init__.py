"""FlashInfer's Python API over our operators. What it promises is in `docs/flashinfer.md`."""
