"""One operator in place of torch's: attention over sequences of different lengths, packed, with grouped heads.

python examples/one_operator.py
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from fastattn import ops

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() and ops.has_cuda_kernels() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
lengths, heads, kv_heads, dim = [3, 70, 17], 8, 2, 64

# Packed: no padding, whatever the lengths are.
total = sum(lengths)
q = torch.randn(total, heads, dim, device=device, dtype=dtype)
k, v = (torch.randn(total, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=device, dtype=torch.int32)
out, lse = ops.varlen_attention(q, k, v, offsets, offsets, max(lengths), max(lengths), causal=True)

# The same, one sequence after the other, by torch.
for begin, end in pairwise(offsets.tolist()):
    one = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(out[begin:end], expected, rtol=2e-2 if device == "cuda" else 1e-4, atol=1e-2)
print(f"{len(lengths)} sequences of {lengths} tokens on {device}: as torch's, largest LSE {lse.max():.3f}")
