"""A GPT trained on real text, with attention by torch's SDPA and by fastattn: both loss curves, and the time of a step.

python -m bench.train_gpt [--steps 200] [--out bench/results]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_TEXT_BYTES = 16 << 20


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H, D), as all of it is here."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    ).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = fastattn.flash_attn_func(q, k, v, causal=True)
    return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """GPT-2's shape, on bytes."""

    def __init__(self, attend: Attention, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, attend) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def read_text() -> Tensor:
    """The source text of Python's own library, which is on every machine, as bytes."""
    parts: list[bytes] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts:
            parts.append(path.read_bytes())
        if sum(map(len, parts)) > _TEXT_BYTES:
            break
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)


def train(attend: Attention, text: Tensor, steps: int, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Losses, and the milliseconds of each step. The same weights at first, the same text."""
    torch.manual_seed(0)
    model = Gpt(attend, args.width, args.width // args.head_dim, args.layers, args.length).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=args.device == "cuda")
    gen = torch.Generator().manual_seed(1)
    losses, events = (
        [],
        [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)] if args.device == "cuda" else [],
    )
    for step in range(steps):
        if events:
            events[step].record()
        starts = torch.randint(len(text) - args.length - 1, (args.batch, 1), generator=gen)
        window = text[starts + torch.arange(args.length + 1)].long().to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1).float(), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    times = []
    if events:
        events[steps].record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(events)]
    return torch.stack(losses).tolist(), times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for train_gpt.json and train_gpt.md")
    args = parser.parse_args()

    text = read_text()
    train(sdpa, text, 3, args)  # warm-up
    # SDPA twice: what two runs of the same method differ by is the noise.
    curves, times = {}, {}
    for name, attend in (("sdpa", sdpa), ("fastattn", ours), ("sdpa again", sdpa)):
        curves[name], times[name] = train(attend, text, args.steps, args)
    apart = {
        name: max(abs(a - b) for a, b in zip(curves[name], curves["sdpa"], strict=True))
        for name in ("fastattn", "sdpa again")
    }
    medians = {name: statistics.median(each) if each else float("nan") for name, each in times.items()}
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    rows = sorted({*range(0, args.steps, max(1, args.steps // 10)), args.steps - 1})
    lines = [
        f"A GPT of {args.layers} layers, width {args.width}, heads of {args.head_dim}, {args.batch} × {args.length} bytes of Python's "
        f"library a step, bf16 autocast, AdamW. {gpu}, torch {torch.__version__}. `python -m bench.train_gpt`",
        "",
        "| | sdpa | fastattn | sdpa again |",
        "|---|---|---|---|",
        "| ms a step (median) | " + " | ".join(f"{medians[name]:.2f}" for name in curves) + " |",
        *(f"| loss at step {step} | " + " | ".join(f"{c[step]:.4f}" for c in curves.values()) + " |" for step in rows),
        f"| largest difference from the first run | | {apart['fastattn']:.4f} | {apart['sdpa again']:.4f} |",
        "",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if name != "out"}
        record = {"settings": settings, "gpu": gpu, "torch": torch.__version__, "losses": curves, "ms": medians}
        (args.out / "train_gpt.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "train_gpt.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
