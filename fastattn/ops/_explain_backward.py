"""`fastattn.explain` of the gradients of attention over contiguous keys."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn import _runtime
from fastattn.ops.checks import fail_value

_TFLOPS, _TB_S = 790.0, 3.0  # what an H100's matrix units and memory were measured to do
_KIB = 1024
_LEAST_SHARED_MEMORY = 160 * _KIB  # of a thread block, for the portable kernel


@dataclass(frozen=True)
class FlashBackward:
    """How the gradients of `batch_attention` would be computed. why: the kernel, and not another. block_n: keys that a CTA gives the gradients
    of at a time, its tile; block_m: query rows of a step. smem_bytes: shared memory of a CTA, of which there is one an SM. num_splits: CTAs that
    share the heads of a group, of one tile. num_tiles: of all of these; the Hopper kernel's CTAs, at most one for each of num_sms, take them by
    turns. num_ops, num_bytes: what any kernel must compute and move."""

    kernel: str
    why: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    deterministic: bool
    padded_head_dim: int
    block_m: int
    block_n: int
    smem_bytes: int
    num_tiles: int
    num_splits: int
    num_ctas: int
    num_sms: int
    num_ops: int
    num_bytes: int

    @property
    def num_waves(self) -> int:
        """Tiles that come one after the other on an SM, at least."""
        return -(-self.num_tiles // self.num_sms)

    def floor_us(self, tflops: float = _TFLOPS, tb_s: float = _TB_S) -> float:
        """Microseconds that it takes at least, at these rates of the matrix units and the memory."""
        return max(self.num_ops / tflops, self.num_bytes / tb_s) / 1e6

    def __str__(self) -> str:
        bound = "matrix units" if self.num_ops / _TFLOPS > self.num_bytes / _TB_S else "memory"
        padded = f" (padded to {self.padded_head_dim})" if self.padded_head_dim != self.head_dim else ""
        split = f", the heads of a group among {self.num_splits} CTAs" if self.num_splits > 1 else ""
        order = "added up in any order, so its last bits may differ from run to run"
        if self.deterministic:
            way = "in the order of the keys" if self.kernel == "sm90" else "by a kernel of its own, 7 products for 5"
            order = f"deterministic, {way}"
        return (
            f"flash_bwd on {self.kernel}: {self.batch} × {self.seqlen_q} queries to {self.seqlen_k} keys, {self.num_heads} "
            f"heads to {self.num_kv_heads} of {self.head_dim}{padded}{', causal' if self.causal else ''}\n"
            f"  {self.why}\n"
            f"  {self.num_tiles} tiles of {self.block_n} keys, {self.block_m} query rows a step{split}; {self.num_ctas} CTAs of "
            f"{self.smem_bytes / _KIB:.0f} KiB of shared memory, {self.num_waves} waves on {self.num_sms} SMs\n"
            f"  dq is {order}\n"
            f"  {self.num_ops / 1e9:.4g} GFLOP, {self.num_bytes / 1e6:.4g} MB: at least {self.floor_us():.3g} µs on an H100, "
            f"bound by its {bound}"
        )


def explain_backward(
    problem: tuple[int, int, int, int, int, int],
    num_pairs: int,
    causal: bool,
    deterministic: bool,
    kernel: str,
    capability: tuple[int, int],
    num_sms: int,
    shared_memory: int,
) -> FlashBackward:
    """problem: B, H, Hk, D, Sq, Sk. num_pairs: of a query and a key that it sees, of one head. kernel: "auto", or one that the GPU can run."""
    batch, heads, kv_heads, dim, seqlen_q, seqlen_k = problem
    hopper = _runtime.flash_bwd_sm90_config(*problem, causal, num_sms)
    portable = _runtime.flash_bwd_sm80_config(*problem, deterministic, shared_memory, num_sms)
    if min(batch, seqlen_q, seqlen_k) == 0:
        kernel, why = "sm80", "there are no queries or no keys"
    elif kernel != "auto":
        why = "as it was asked for"
    elif capability != (9, 0):
        kernel, why = "sm80", f"the GPU is of compute capability {capability[0]}.{capability[1]}"
    elif hopper["is_better"]:
        kernel, why = "sm90", "as the GPU is a Hopper"
    else:
        kernel = "sm80"
        why = (
            f"as Hopper's kernel would have {hopper['num_tiles']} tiles, less than a third of {num_sms} SMs, and cannot share "
            "out the heads of a group"
        )
    config, num_splits = (hopper, 1) if kernel == "sm90" else (portable, portable["num_splits"])
    if kernel == "sm80" and shared_memory < _LEAST_SHARED_MEMORY:
        fail_value(
            "explain",
            f"the GPU gives a thread block {shared_memory} bytes of shared memory, expected {_LEAST_SHARED_MEMORY} for "
            "flash_bwd",
        )
    return FlashBackward(
        kernel, why, batch, seqlen_q, seqlen_k, heads, kv_heads, dim, causal, deterministic, config["head_dim"],
        config["block_m"], config["block_n"], config["smem_bytes"], config["num_tiles"], num_splits, config["num_ctas"],
        num_sms,
        10 * batch * heads * num_pairs * dim,  # S, dP, dV, dK, dQ
        # q, out, dout and dq; k, v, dk and dv; the LSE
        8 * batch * dim * (seqlen_q * heads + seqlen_k * kv_heads) + 4 * batch * heads * seqlen_q,
    )  # fmt: skip
