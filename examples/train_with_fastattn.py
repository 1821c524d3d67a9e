"""Attention swapped in a Hugging Face model: it learns real text as with torch's SDPA, the same loss at every step.

python examples/train_with_fastattn.py [--steps 60] [--length 128] [--plot losses.png]
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
import transformers

import fastattn.integrations.transformers  # noqa: F401, this registers attn_implementation="fastattn"
from fastattn import ops

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
parser.add_argument("--plot", help="write both loss curves to this file; needs matplotlib")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() and ops.has_cuda_kernels() else "cpu"
# The text of Python's own help(), byte by byte: it is on every machine.
text = torch.frombuffer(bytearray("\n".join(topics.values()), "utf-8"), dtype=torch.uint8).long()
config = transformers.LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=args.length, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def train(attention: str) -> list[float]:
    """The loss of each step. Both runs begin with the same weights and read the same text."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(device)
    model.set_attn_implementation(attention)  # the one line that differs
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses, began = [], time.perf_counter()
    for _ in range(args.steps):
        starts = torch.randint(len(text) - args.length, (args.batch, 1))
        ids = text[starts + torch.arange(args.length)].to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # read at the end: reading waits for the GPU
    values = torch.stack(losses).tolist()
    print(f"{attention}: {(time.perf_counter() - began) / args.steps * 1e3:.1f} ms a step on {device}")
    return values


curves = {name: train(name) for name in ("sdpa", "fastattn")}
print(f"{'step':>6}{'sdpa':>10}{'fastattn':>10}")
for step in sorted({*range(0, args.steps, max(1, args.steps // 8)), args.steps - 1}):
    print(f"{step:>6}{curves['sdpa'][step]:>10.4f}{curves['fastattn'][step]:>10.4f}")
apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
print(f"largest difference of a step's loss: {apart:.4f}")

if args.plot:
    from matplotlib import pyplot

    for name, curve in curves.items():
        pyplot.plot(curve, label=name)
    pyplot.xlabel("step")
    pyplot.ylabel("loss")
    pyplot.legend()
    pyplot.savefig(args.plot)
