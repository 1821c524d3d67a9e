"""`eval`: how well a model predicts real text, and how far it is from another model, through our own engine's network.

KL(teacher ‖ student) is the mean over tokens of Σ p log(p / q): the nats by which the student's prediction of the next token
differs from the teacher's. Top-1 agreement is the share of tokens where both think the same one likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fastattn import nn
from fastattn.compress.sources import Model, opened
from fastattn.compress.text import load_corpus, token_windows
from fastattn.compress.walk import window_cache
from fastattn.engine.device import choose_device, choose_dtype
from fastattn.engine.kv_scales import check_kv_scales, choose_kv_cache, load_kv_scales
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelSource
from fastattn.models.loader.quantized_source import check_quantization, with_quantization
from fastattn.models.registry import load_model

# Tokens whose logits are held at once, for each of two models.
_LOGIT_ROWS = 512


@dataclass(frozen=True)
class Evaluation:
    """nll: mean −log p of the next token, in nats; perplexity: its exponential. kl_*, top1: against the other model."""

    model: str
    text: str
    text_digest: str
    num_tokens: int
    nll: float
    perplexity: float
    against: str | None = None
    against_perplexity: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    kv_cache_dtype: str | None = None
    kv_cache_scales: str | None = None
    quantization: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class EvalOptions:
    """files: text; none is the held-out part of the built-in one. max_tokens: stop after so many; None: all of it.
    kv_cache_dtype, kv_cache_scales: as the engine's, of the model that is judged; the other's cache is in its own dtype. Scales
    to "calculate" are of the first window. quantization: likewise the engine's, of the model that is judged."""

    files: tuple[str, ...] = ()
    length: int = 512
    max_tokens: int | None = 16384
    device: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_cache_scales: str = "auto"
    quantization: str | None = None

    def __post_init__(self) -> None:
        check_quantization(self.quantization)
        if self.length < 2:
            raise ValueError(f"length is {self.length}, allowed is from 2")
        if self.kv_cache_dtype != "auto":  # which the model decides about
            nn.check_kv_cache_scales(self.kv_cache_scales, self.kv_cache_dtype)
        if self.max_tokens is not None and self.max_tokens < self.length:
            raise ValueError(f"max_tokens is {self.max_tokens}, allowed is from length = {self.length}")


def evaluate(
    model: Model,
    against: Model | None = None,
    options: EvalOptions | None = None,
    *,
    show_progress: bool = False,
) -> Evaluation:
    """Perplexity of ``model`` on text, and its distance from the model ``against``, the teacher.

    Both are held in memory. Raises ValueError, in one line, for what cannot work, such as two vocabularies.
    """
    options = options or EvalOptions()
    student, teacher = (
        with_quantization(opened(model), options.quantization),
        None if against is None else opened(against),
    )
    kv_cache_scales, kv_cache_dtype = choose_kv_cache(options.kv_cache_scales, options.kv_cache_dtype, student)
    corpus = load_corpus(options.files, "evaluation")
    count = None if options.max_tokens is None else options.max_tokens // options.length
    tokens = token_windows(corpus, student.tokenizer(), options.length, count)
    if teacher is not None:
        check_same_vocabulary(student, teacher)
    judged = [_load(student, options, kv_cache_dtype, kv_cache_scales)]
    if teacher is not None:
        judged.append(_load(teacher, options, "auto", "dynamic"))
    sums = _Sums()
    for window in tqdm(tokens, desc="Evaluating", unit="window", disable=None if show_progress else True):
        sums.add_window(judged, window)
    return Evaluation(
        model=Path(student.name).name,
        text=corpus.name,
        text_digest=corpus.digest,
        num_tokens=sums.count,
        nll=sums.mean(sums.nll[0]),
        perplexity=math.exp(min(sums.mean(sums.nll[0]), 700)),
        against=None if teacher is None else Path(teacher.name).name,
        against_perplexity=None if teacher is None else math.exp(min(sums.mean(sums.nll[1]), 700)),
        kl_mean=None if teacher is None else sums.mean(sums.kl),
        kl_max=None if teacher is None else sums.kl_max,
        top1=None if teacher is None else sums.mean(sums.agreed),
        kv_cache_dtype=None if kv_cache_dtype == "auto" else kv_cache_dtype,
        kv_cache_scales=None if kv_cache_dtype == "auto" else kv_cache_scales,
        quantization=options.quantization,
    )


def check_same_vocabulary(student: ModelSource, teacher: ModelSource) -> None:
    """Raises ValueError if the two models' tokens are not the same."""
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{student.name} has {sizes[0]} tokens, {teacher.name} has {sizes[1]}: they cannot be compared"
        )
    ours, theirs = student.tokenizer().vocabulary(), teacher.tokenizer().vocabulary()
    if different := sorted(ours.items() ^ theirs.items(), key=lambda item: item[1]):
        token, token_id = different[0]
        raise ValueError(
            f"token {token_id}, {token!r}, is not the same to {student.name} and {teacher.name}: they cannot be compared"
        )


def hidden_states(
    network: DecoderModel,
    tokens: Tensor,
    form: nn.KVCacheFormat | None = None,
    static_scales: Tensor | None = None,
    calibrate: bool = False,
) -> Tensor:
    """tokens (n, length) → hidden states (n · length, hidden_size) after the final norm, in one pass.

    form: of the KV cache, by default in the model's dtype. static_scales: the cache's (see `nn.KVMemory`), to be overwritten by
    those of these tokens with ``calibrate``.
    """
    config, weight = network.config, network.embed_tokens.weight
    count, length = tokens.shape
    form = form or nn.KVCacheFormat(weight.dtype)
    meta, caches = window_cache(
        config.num_kv_heads, config.head_dim, count, length, weight.device, form, config.num_layers, static_scales
    )
    meta = replace(meta, calibrate=calibrate)
    hidden: Tensor = network(tokens.to(weight.device, torch.int32).flatten(), meta, caches)
    return hidden


@dataclass
class _Judged:
    network: DecoderModel
    form: nn.KVCacheFormat
    static_scales: Tensor | None
    calibrate: bool

    def hidden(self, window: Tensor) -> Tensor:
        """window (length) → hidden states (length - 1, hidden_size), which predict all tokens but the first."""
        states = hidden_states(self.network, window[None], self.form, self.static_scales, self.calibrate)
        self.calibrate = False
        return states[:-1]


class _Sums:
    """Adds up in double precision over tokens."""

    def __init__(self) -> None:
        self.count, self.kl, self.kl_max, self.agreed = 0, 0.0, 0.0, 0.0
        self.nll = [0.0, 0.0]

    def mean(self, total: float) -> float:
        return total / self.count

    @torch.inference_mode()
    def add_window(self, judged: Sequence[_Judged], window: Tensor) -> None:
        networks = [one.network for one in judged]
        hidden = [one.hidden(window) for one in judged]
        targets = window[1:].to(hidden[0].device)
        for rows in _chunks(len(targets)):
            logs = [functional.log_softmax(n.logits(h[rows]), -1) for n, h in zip(networks, hidden, strict=True)]
            for which, log in enumerate(logs):
                self.nll[which] -= float(log.gather(1, targets[rows, None]).sum(dtype=torch.float64))
            if len(logs) == 2:
                student, teacher = logs
                kl = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
                self.kl += float(kl.sum())
                self.kl_max = max(self.kl_max, float(kl.max()))
                self.agreed += float((student.argmax(-1) == teacher.argmax(-1)).sum())
        self.count += len(targets)
        if not math.isfinite(self.nll[0]):
            raise ValueError("the model gave logits that are not numbers")


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _LOGIT_ROWS):
        yield slice(start, min(start + _LOGIT_ROWS, count))


def _load(source: ModelSource, options: EvalOptions, kv_cache_dtype: str, kv_cache_scales: str) -> _Judged:
    if options.length > source.config.max_position_embeddings:
        raise ValueError(f"length is {options.length}, allowed is up to {source.config.max_position_embeddings} here")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = source.config
    form = nn.kv_cache_format(kv_cache_dtype, dtype, config.head_dim, kv_cache_scales)
    check_kv_scales(kv_cache_scales, kv_cache_dtype, source)
    scales = load_kv_scales(kv_cache_scales, kv_cache_dtype, source)
    if form.calibrated:
        scales = torch.ones(config.num_layers, 2, config.num_kv_heads)
    network = load_model(source, device, dtype, options.length)
    return _Judged(network, form, None if scales is None else scales.to(device), form.calibrated)
