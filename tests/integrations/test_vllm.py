"""The plug-in for vLLM without vLLM: a layer's step through a stand-in for its interface, against attention by hand."""

from __future__ import annotations

import logging
import math
import pkgutil
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn.integrations.vllm as plugin
from fastattn import ops
from tests.integrations import vllm_interface
from tests.integrations.vllm_interface import AttentionType, CUDAGraphMode, DeviceCapability, installed

QUERIES, KEYS = [70, 1, 3, 1, 0], [70, 33, 40, 1, 0]  # of each sequence; the last one is a graph's padding
PADDING = 5  # rows behind the last token


@dataclass(frozen=True)
class Case:
    name: str
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page: int = 16
    layout: str = "NHD"
    dtype: str = "auto"
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    scales: tuple[float, ...] = (1.0,)  # of keys; those of values are twice as large


CASES = [
    Case("plain"),
    Case("HND", layout="HND", page=32),
    Case("32 heads to 8 of 128", 32, 8, 128),
    Case("one KV head of 80", 4, 1, 80),
    Case("window and softcap", window=10, softcap=5.0),
    Case("ALiBi", alibi=True),
    Case("sinks and window", sinks=True, window=20),
    Case("fp8", dtype="fp8", scales=(0.5,)),
    Case("fp8 by heads, HND", dtype="fp8_e4m3", scales=(0.5, 0.75), layout="HND"),
]


class Step:
    """One step of a layer: sequences with keys in the cache already, and new ones to write."""

    def __init__(self, case: Case, backend: Any, device: str) -> None:
        self.case, self.device = case, device
        gen = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=gen).to(device, torch.bfloat16)

        rows = sum(QUERIES) + PADDING
        self.q, self.out = drawn(rows, case.heads, case.head_dim), drawn(rows, case.heads, case.head_dim)
        self.k, self.v = ([drawn(n, case.kv_heads, case.head_dim) for n in KEYS] for _ in "kv")
        self.sinks = torch.nn.Parameter(drawn(case.heads)) if case.sinks else None
        self.slopes = [2.0 ** -(i + 1) for i in range(case.heads)] if case.alibi else None
        scale = torch.tensor(case.scales, device=device)
        scale = scale[0] if len(case.scales) == 1 else scale
        self.layer = SimpleNamespace(_k_scale=scale, _v_scale=2 * scale)

        pages = [-(-n // case.page) for n in KEYS]
        table = torch.full((len(KEYS), 12), 10**6, dtype=torch.int32)  # as many as the longest sequence may have
        order = torch.randperm(sum(pages) + 3, generator=gen).int()
        for b, n in enumerate(pages):
            table[b, :n] = order[sum(pages[:b]) : sum(pages[:b]) + n]
        self.table = table.to(device)
        width = 2 * case.head_dim
        shape = backend.FastattnBackend.get_kv_cache_shape(len(order), case.page, case.kv_heads, case.head_dim)
        assert shape == (len(order), case.kv_heads, case.page, width)
        memory = backend.FastattnBackend.get_kv_cache_stride_order()
        cache = torch.full([shape[i] for i in memory], math.nan, dtype=torch.bfloat16)
        if case.dtype.startswith("fp8"):
            cache = torch.full([shape[i] for i in memory], 0x7F, dtype=torch.uint8)  # NaN
        self.cache = cache.to(device).permute([memory.index(i) for i in range(4)])

        self.impl = backend.FastattnImpl(
            case.heads, case.head_dim, case.head_dim**-0.5, case.kv_heads, self.slopes, case.window, case.dtype,
            case.softcap, AttentionType.DECODER, None, **({"sinks": self.sinks} if case.sinks else {}),
        )  # fmt: skip
        if self.impl.alibi_slopes is not None:
            self.impl.alibi_slopes = self.impl.alibi_slopes.to(device)  # vLLM builds models in the device's context
        self.impl.process_weights_after_loading(torch.bfloat16)

    def slots(self, new: bool) -> tuple[Tensor, list[tuple[int, int]]]:
        """Of the keys that are new or were there before: slots, and (sequence, position)."""
        places = [(b, i) for b, n in enumerate(KEYS) for i in range(n) if (i >= n - QUERIES[b]) == new]
        page = self.case.page
        slots = [int(self.table[b, i // page]) * page + i % page for b, i in places]
        return torch.tensor(slots, device=self.device), places

    def write(self, new: bool) -> None:
        slots, places = self.slots(new)
        rows = [torch.stack([x[b][i] for b, i in places]) for x in (self.k, self.v)]
        if new:  # vLLM pads keys and values, and not the slots
            rows = [torch.cat([x, torch.full_like(x[:PADDING], math.nan)]) for x in rows]
        self.impl.do_kv_cache_update(self.layer, *rows, self.cache, slots)

    def common(self, **changes: Any) -> vllm_interface.CommonAttentionMetadata:
        starts = torch.tensor([0, *QUERIES], device=self.device).cumsum(0).int()
        values = {
            "query_start_loc": starts,
            "query_start_loc_cpu": starts.cpu(),
            "seq_lens": torch.tensor(KEYS, dtype=torch.int32, device=self.device),
            "num_reqs": len(KEYS),
            "num_actual_tokens": sum(QUERIES),
            "max_query_len": max(QUERIES),
            "max_seq_len": max(KEYS),
            "block_table_tensor": self.table,
            "slot_mapping": self.slots(new=True)[0],
        }
        return vllm_interface.CommonAttentionMetadata(**(values | changes))

    def expected(self) -> Tensor:
        """(T, H, D) fp32, by hand."""
        case, rows, start = self.case, [], 0
        for b, n in enumerate(KEYS):
            k, v = self.k[b].float(), self.v[b].float()
            if case.dtype.startswith("fp8"):
                by_head = (scale.reshape(-1, 1) for scale in (self.layer._k_scale, self.layer._v_scale))
                k, v = ((x / s).to(torch.float8_e4m3fn).float() * s for x, s in zip((k, v), by_head, strict=True))
            k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
            q = self.q[start : start + QUERIES[b]].float()
            scores = torch.einsum("qhd,khd->hqk", q, k) * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * (scores / case.softcap).tanh()
            distance = torch.arange(n - QUERIES[b], n)[:, None] - torch.arange(n)  # of a query to the keys before it
            distance = distance.to(self.device)
            if self.slopes:
                scores -= torch.tensor(self.slopes, device=self.device)[:, None, None] * distance
            hidden = distance < 0
            if case.window:
                hidden |= distance >= case.window
            scores = scores.masked_fill(hidden, -math.inf)
            if self.sinks is not None:
                sink = self.sinks.detach().float()[:, None, None].expand(-1, QUERIES[b], 1)
                weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, v))
            start += QUERIES[b]
        return torch.cat(rows)


def builder_of(backend: Any, page: int = 16, **options: Any) -> Any:
    spec = SimpleNamespace(block_size=page)
    return backend.FastattnMetadataBuilder(spec, ["layer"], vllm_interface.config(**options), torch.device("cpu"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_step_of_a_layer(case: Case, device: str) -> None:
    with installed(case.layout) as backend:
        step = Step(case, backend, device)
        step.write(new=False)
        step.write(new=True)
        metadata = builder_of(backend, case.page).build(0, step.common())
        before = step.out.clone()
        found = step.impl.forward(step.layer, step.q, None, None, step.cache, metadata, output=step.out)
    assert found is step.out
    tokens = sum(QUERIES)
    torch.testing.assert_close(step.out[:tokens].float(), step.expected(), rtol=0.02, atol=0.02)
    assert torch.equal(step.out[tokens:], before[tokens:]), "rows behind the last token are not ours"


def test_a_run_without_metadata_gives_zeros() -> None:
    with installed() as backend:
        step = Step(CASES[0], backend, "cpu")
        step.impl.forward(step.layer, step.q, None, None, torch.tensor([]), None, output=step.out)
    assert not step.out.any()


def test_sinks_are_converted_once_and_stay_where_they_are() -> None:
    with installed() as backend:
        step = Step(CASES[6], backend, "cpu")
        first = step.impl._fp32_sinks
        step.sinks.data.add_(1.0)  # type: ignore[union-attr]
        step.impl.process_weights_after_loading(torch.bfloat16)
    assert step.impl._fp32_sinks is first and torch.equal(first, step.sinks.detach().float())  # type: ignore[union-attr]


def test_metadata() -> None:
    with installed() as backend:
        step = Step(CASES[0], backend, "cpu")
        builder = builder_of(backend)
        prompts = builder.build(0, step.common(max_query_len=torch.tensor(70).numpy()))
        assert prompts.block_table.shape == (5, 5) and type(prompts.max_query_len) is int
        # A graph of a draft may be captured by `build`: its table must serve what is longer at a replay.
        decodes = builder.build(0, step.common(max_query_len=3))
        assert decodes.block_table.data_ptr() == step.table.data_ptr() and decodes.block_table.shape == (5, 12)
        # Longer tensors than the batch, as vLLM's buffers are.
        part = builder.build(0, step.common(num_reqs=2, num_actual_tokens=71))
        assert (len(part.seq_lens), len(part.query_start_loc), len(part.block_table)) == (2, 3, 2)

        other = torch.zeros(8, 12, dtype=torch.int32)
        moved = builder.update_block_table(prompts, other, step.table)
        assert moved.block_table.shape == (5, 5) and moved.block_table.data_ptr() == other.data_ptr()
        assert moved.slot_mapping is step.table and prompts.block_table.data_ptr() == step.table.data_ptr()
        same = [f.name for f in fields(moved) if f.name not in ("block_table", "slot_mapping")]
        assert all(getattr(moved, name) is getattr(prompts, name) for name in same)


def test_one_graph_for_prompts_too_expects_any_run_of_queries() -> None:
    with installed() as backend:
        step = Step(CASES[0], backend, "cpu")
        common = step.common(max_query_len=1)
        assert builder_of(backend).build_for_cudagraph_capture(common).max_query_len == 1
        full = builder_of(backend, mode=CUDAGraphMode.FULL).build_for_cudagraph_capture(common)
        assert full.max_query_len == sum(QUERIES) and full.block_table.shape == (5, 12)


def test_memory_orders() -> None:
    for layout, plain, layers in (("NHD", (0, 2, 1, 3), (1, 0, 3, 2, 4)), ("HND", (0, 1, 2, 3), (1, 2, 0, 3, 4))):
        with installed(layout) as backend:
            assert backend.FastattnBackend.get_kv_cache_stride_order() == plain
            assert backend.FastattnBackend.get_kv_cache_stride_order(include_num_layers_dimension=True) == layers


def reason(backend: Any, **changes: Any) -> str | None:
    asked: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "device_capability": DeviceCapability(9, 0),
    }
    answer: str | None = backend.FastattnBackend.supports_combination(**(asked | changes))
    return answer


def test_what_it_cannot_do_is_said_with_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed() as backend:
        monkeypatch.setattr(backend, "has_cuda_kernels", lambda: False)
        assert "kernels are not built; build them with" in str(reason(backend))
        monkeypatch.setattr(backend, "has_cuda_kernels", lambda: True)
        for changes in (
            {},
            {"kv_cache_dtype": None},
            {"kv_cache_dtype": "bfloat16"},
            {"kv_cache_dtype": "fp8", "head_size": 80, "dtype": torch.float16},
            {"head_size": 72, "device_capability": DeviceCapability(8, 6)},
        ):
            assert reason(backend, **changes) is None
        for changes, says in (
            ({"head_size": 260}, "head_size is 260, expected a multiple of 8 up to 256"),
            ({"head_size": 72, "kv_cache_dtype": "fp8"}, "head_size is 72, expected a multiple of 16 up to 256"),
            ({"dtype": torch.float32}, "dtype is torch.float32, expected one of torch.float16, torch.bfloat16"),
            (
                {"kv_cache_dtype": "fp8_e5m2"},
                "kv_cache_dtype is fp8_e5m2, expected one of auto, float16, bfloat16, fp8",
            ),
            (
                {"kv_cache_dtype": "float16"},
                "kv_cache_dtype is float16, expected auto or fp8 with dtype torch.bfloat16",
            ),
            ({"device_capability": DeviceCapability(10, 0)}, "compute capability is 10.0, expected 8.x or 9.0"),
        ):
            assert says in str(reason(backend, **changes)), changes
        both = reason(backend, head_size=12, kv_cache_dtype="nvfp4")
        assert both is not None and both.startswith("fastattn: head_size") and "; kv_cache_dtype is nvfp4" in both

        cls = backend.FastattnBackend
        assert [cls.supports_head_size(n) for n in (0, 4, 8, 80, 256, 264)] == [False, False, True, True, True, False]
        assert cls.supports_attn_type("decoder") and not cls.supports_attn_type(AttentionType.ENCODER_DECODER)
        with pytest.raises(NotImplementedError, match=r"attn_type is .*expected decoder"):
            backend.FastattnImpl(8, 64, 1.0, attn_type="encoder_only")
        with pytest.raises(NotImplementedError, match="rswa_window is 7"):
            builder_of(backend, rswa_window=7)
        step = Step(CASES[0], backend, "cpu")
        with pytest.raises(NotImplementedError, match="causal"):
            builder_of(backend).build(0, step.common(causal=False))
        ones = torch.ones(1)
        with pytest.raises(NotImplementedError, match="output_block_scale is given"):
            step.impl.forward(
                step.layer, step.q, None, None, step.cache, None, step.out, output_scale=ones, output_block_scale=ones
            )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_output_in_fp8_for_the_next_product(shape: tuple[int, ...], device: str) -> None:
    with installed() as backend:
        key = vllm_interface.kFp8StaticTensorSym
        step = Step(CASES[0], backend, device)
        assert step.impl.fused_output_quant_supported(key)
        assert not step.impl.fused_output_quant_supported(key._replace(scale="dynamic, per token"))
        step.write(new=False)
        step.write(new=True)
        out, scale = step.out.to(torch.float8_e4m3fn), torch.full(shape, 0.01, device=device)
        padding = out[sum(QUERIES) :].float().clone()
        metadata = builder_of(backend, CASES[0].page).build(0, step.common())
        given = {"output": out, "output_scale": scale}
        assert step.impl.forward(step.layer, step.q, None, None, step.cache, metadata, **given) is out
        torch.testing.assert_close(out[: sum(QUERIES)].float() * 0.01, step.expected(), rtol=0.08, atol=0.02)
        assert torch.equal(out[sum(QUERIES) :].float(), padding)
        step.impl.forward(step.layer, step.q, None, None, step.cache, None, **given)
        assert not out.float().any()


def test_batch_invariance_is_asked_for_by_vllms_switch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed() as backend:
        assert not backend.FastattnImpl(8, 64, 1.0).batch_invariant
    with installed(batch_invariant=True) as backend:
        assert backend.FastattnBackend.supports_batch_invariance()
        for option in ("chunked_prefill", "prefix_caching"):
            with pytest.raises(NotImplementedError, match=f"enable_{option} is True.*expected False"):
                builder_of(backend, **{"chunked_prefill": False, "prefix_caching": False, option: True})
        step = Step(CASES[0], backend, device)
        step.write(new=False)
        step.write(new=True)
        asked: list[bool] = []

        def attend(*call: Any, batch_invariant: bool, **options: Any) -> Any:
            asked.append(batch_invariant)
            return ops.paged_attention(*call, batch_invariant=batch_invariant, **options)

        monkeypatch.setattr(backend, "paged_attention", attend)
        builder = builder_of(backend, CASES[0].page, chunked_prefill=False, prefix_caching=False)
        metadata = builder.build(0, step.common())
        step.impl.forward(step.layer, step.q, None, None, step.cache, metadata, output=step.out)
    assert asked == [True]
    torch.testing.assert_close(step.out[: sum(QUERIES)].float(), step.expected(), rtol=0.02, atol=0.02)


def test_entry_point_leads_to_register() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    entry = re.search(r'^\[project\.entry-points\."vllm\.general_plugins"\]\nfastattn = "(.*)"$', text, re.M)
    assert entry is not None and pkgutil.resolve_name(entry[1]) is plugin.register


def test_register(caplog: pytest.LogCaptureFixture) -> None:
    custom = vllm_interface.Backends.CUSTOM
    with installed() as backend:
        plugin.register()
        plugin.register()
        assert pkgutil.resolve_name(custom.get_path().replace(".Fast", ":Fast")) is backend.FastattnBackend
        assert backend.FastattnBackend.get_name() == custom.name and not caplog.records
        vllm_interface.overrides[custom] = "theirs.Backend"
        plugin.register()
        assert custom.get_path() == "theirs.Backend" and "theirs.Backend" in caplog.records[-1].getMessage()


def test_register_on_another_vllm_warns_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with installed(), caplog.at_level(logging.WARNING):
        vllm_interface.sys.modules.pop("vllm.v1.attention.backends.registry")
        plugin.register()
    assert "vLLM has no registry of attention backends" in caplog.text
