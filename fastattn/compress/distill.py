"""`distill`: trains a student to predict as its teacher does: min KL(teacher ‖ student) over text (Hinton et al., 2015).

The teacher runs on our engine's network, so it may be in any format that we load. The student is trained through
`transformers`, which has the backward pass; only its weights leave this module.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from fastattn.compress.evaluate import check_same_vocabulary, hidden_states
from fastattn.compress.hf_folder import folder_files, hf_config, stores_norms_minus_one
from fastattn.compress.output import OutputFolder, check_free
from fastattn.compress.prune import is_two_of_four
from fastattn.compress.receipt import source_digest, versions
from fastattn.compress.rewrite import choose_output_dtype
from fastattn.compress.sources import Model, open_plain, opened
from fastattn.compress.text import Corpus, load_corpus, token_windows
from fastattn.compress.walk import read_weight
from fastattn.engine.device import choose_device, choose_dtype
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelSource
from fastattn.models.loader.kv_scales import is_kv_scale
from fastattn.models.registry import load_model

logger = logging.getLogger("fastattn.compress")

# Tokens whose logits are held at once, of teacher and student.
_LOGIT_ROWS = 256
_CHECKPOINT = "checkpoint.safetensors"
_GENERATED = "generated.json"
_WARMUP, _FLOOR = 0.05, 0.1  # share of the run, share of the learning rate at its end
_PROMPT_TOKENS = 8


@dataclass(frozen=True)
class DistillOptions:
    """files: text to learn from; none is the built-in one. generate: learn from this many texts that the teacher writes
    itself, each begun with the first words of one of those, instead.

    steps of batch_size windows of length tokens, micro_batch windows at a time. The learning rate rises for 5 % of the run
    and falls to a tenth along a cosine; max_minutes ends the run earlier, and the fall with it. temperature: softens both
    distributions. train_embeddings: the embeddings (and a tied head) learn too. Zeros in a 2:4 pattern stay zeros.
    """

    files: tuple[str, ...] = ()
    generate: int = 0
    steps: int = 200
    batch_size: int = 4
    micro_batch: int = 2
    length: int = 256
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    temperature: float = 1.0
    max_minutes: float | None = None
    checkpoint_minutes: float = 2.0
    train_embeddings: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("generate", 0), ("steps", 1), ("batch_size", 1), ("micro_batch", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed is an integer from {least}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < 1e3:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed is above 0")
        if not 0 <= self.weight_decay < 1:
            raise ValueError(f"weight_decay is {self.weight_decay!r}, allowed is from 0, below 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed!r}, allowed is an integer from 0, below 2**32")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max_minutes is {self.max_minutes!r}, allowed is above 0")


def distill(
    student: Model,
    out: str | Path,
    teacher: Model,
    options: DistillOptions | None = None,
    *,
    force: bool = False,
    show_progress: bool = False,
) -> Path:
    """Trains ``student`` on what ``teacher`` predicts and writes it into the folder ``out``, with plain weights.

    Interrupted, it goes on from its last checkpoint when called again with the same options. Raises ValueError, in one line,
    for what cannot work; ImportError without transformers.
    """
    options, out = options or DistillOptions(), Path(out)
    pupil = open_plain(student)
    master = opened(teacher)
    if any(map(is_kv_scale, pupil.tensors())):
        logger.warning(
            "%s: static scales of its KV cache are not kept, they are of the weights before training", pupil.name
        )
    check_free(out, force, pupil.name, master.name)
    check_same_vocabulary(pupil, master)
    limit = min(pupil.config.max_position_embeddings, master.config.max_position_embeddings)
    if options.length > limit:
        raise ValueError(f"length is {options.length}, allowed is up to {limit} for these models")
    corpus = load_corpus(options.files, "calibration")
    if not options.generate:
        token_windows(corpus, pupil.tokenizer(), options.length, 1)  # too short a text is said before a folder is begun
    dtype = choose_output_dtype(pupil, options.dtype)
    digest = source_digest(pupil)
    described: dict[str, Any] = {
        "command": "distill",
        "source": digest,
        "teacher": source_digest(master),
        "method": {key: value for key, value in asdict(options).items() if key not in ("files", "dtype", "device")},
        "dtype": str(dtype).removeprefix("torch."),
        "text": {"text": corpus.name, "digest": corpus.digest},
    }
    num_layers = pupil.config.num_layers
    with OutputFolder(out, described | {"versions": versions()}, num_layers + 2, force) as folder:
        trainer = Trainer(pupil, master, options, show_progress)
        report = trainer.run(folder, corpus)
        for shard in range(num_layers + 2):
            if not folder.has_shard(shard):
                folder.write_shard(shard, trainer.shard(shard, dtype), {})
        receipt = {
            **described,
            "source": {"name": Path(pupil.name).name, "digest": digest, "architecture": pupil.config.architecture},
            "teacher": {"name": Path(master.name).name, "digest": described["teacher"]},
            "versions": versions(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "bytes": {"before": sum(info.nbytes for info in pupil.tensors().values())},
            "training": report,
        }
        for name in (_CHECKPOINT, _GENERATED):
            folder.discard(name)
        return folder.finish(folder_files(pupil, pupil.config, dtype), receipt)


class Trainer:
    """The student with its optimizer, and the teacher."""

    def __init__(
        self, student: ModelSource, teacher: ModelSource, options: DistillOptions, show_progress: bool
    ) -> None:
        self.options, self.source, self.teacher_source, self.show_progress = options, student, teacher, show_progress
        self.device = choose_device(options.device)
        self.model = hf_module(student).to(self.device)
        self.softcap = student.config.final_softcap
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(
                options.train_embeddings or not name.startswith(("model.embed_tokens.", "lm_head."))
            )
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.masks = {name: p.detach() != 0 for name, p in self.trained.items() if is_two_of_four(p)}
        if self.masks:
            logger.info("%d matrices are 2:4 sparse and stay so", len(self.masks))
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []

    # ---- the run ----

    def run(self, folder: OutputFolder, corpus: Corpus) -> dict[str, Any]:
        """Trains to the end, from the last checkpoint if there is one. Returns what the receipt says of it."""
        self._restore(folder)
        started, saved = time.monotonic() - self.seconds, self.seconds
        if not self.finished:
            if self.options.generate:
                corpus = self._generated(folder, corpus)
            windows = token_windows(corpus, self.source.tokenizer(), self.options.length)
            network = self._load_teacher()
            with tqdm(
                total=self.options.steps,
                initial=self.step,
                desc="Distilling",
                disable=None if self.show_progress else True,
            ) as bar:
                while not self.finished:
                    self.losses.append(self.train_step(network, self._batch(windows)))
                    self.step += 1
                    self.seconds = time.monotonic() - started
                    bar.set_postfix(kl=f"{self.losses[-1]:.3f}", refresh=False)
                    bar.update()
                    if self.seconds - saved > 60 * self.options.checkpoint_minutes or self.finished:
                        self._save(folder)
                        saved = self.seconds
        tenth = max(1, len(self.losses) // 10)
        tokens = self.step * self.options.batch_size * self.options.length
        return {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "tokens": tokens,
            "kl_first": round(sum(self.losses[:tenth]) / tenth, 5),
            "kl_last": round(sum(self.losses[-tenth:]) / tenth, 5),
            "sparse_matrices": len(self.masks),
        }

    @property
    def progress(self) -> float:
        """0 at the start, 1 when steps or minutes are used up, whichever comes first."""
        by_time = self.seconds / (60 * self.options.max_minutes) if self.options.max_minutes is not None else 0.0
        return max(self.step / self.options.steps, by_time)

    @property
    def finished(self) -> bool:
        return self.progress >= 1

    def train_step(self, teacher: DecoderModel, batch: Tensor) -> float:
        """One step on windows (batch, length); the mean KL before it."""
        loss = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for tokens in torch.split(batch, self.options.micro_batch):
            loss += self._backward(teacher, tokens, batch.numel())
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {self.step}: lower learning_rate (it is {self.options.learning_rate})"
            )
        for name, mask in self.masks.items():
            gradient = self.trained[name].grad
            assert gradient is not None
            gradient.mul_(mask)  # so its moments stay zero, and with them the weight
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * schedule(self.progress)
        self.optimizer.step()
        return loss

    def _backward(self, teacher: DecoderModel, tokens: Tensor, num_tokens: int) -> float:
        """Adds the gradients of a micro-batch's share of the mean, and returns that share.

        The vocabulary is wide: logits exist for a few rows at a time, each with its own backward pass into the hidden states.
        """
        with torch.inference_mode():
            target = hidden_states(teacher, tokens)
        autocast = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        temperature, total = self.options.temperature, 0.0
        with autocast:
            hidden = self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state.flatten(0, 1)
        leaf = hidden.detach().requires_grad_()
        for start in range(0, leaf.shape[0], _LOGIT_ROWS):
            rows = slice(start, start + _LOGIT_ROWS)
            with torch.inference_mode():
                wanted = functional.log_softmax(teacher.logits(target[rows]) / temperature, -1)
            with autocast:
                logits = self.model.lm_head(leaf[rows]).float()
            if self.softcap:
                logits = torch.tanh(logits / self.softcap) * self.softcap
            given = functional.log_softmax(logits / temperature, -1)
            kl = functional.kl_div(given, wanted.clone(), reduction="sum", log_target=True)
            share = kl * (temperature**2 / num_tokens)
            share.backward()  # type: ignore[no-untyped-call]
            total += float(share.detach())
        hidden.backward(leaf.grad)
        return total

    def _batch(self, windows: Tensor) -> Tensor:
        """The batch of this step: each pass over the text in an order of its own, which depends on the seed alone."""
        size, count = self.options.batch_size, windows.shape[0]
        picked = []
        for at in range(self.step * size, (self.step + 1) * size):
            epoch, index = divmod(at, count)
            generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + epoch)
            picked.append(int(torch.randperm(count, generator=generator)[index]))
        return windows[picked]

    # ---- teacher ----

    def _load_teacher(self) -> DecoderModel:
        dtype = choose_dtype("auto", self.device)
        return load_model(self.teacher_source, self.device, dtype, self.options.length, self.show_progress)

    def _generated(self, folder: OutputFolder, corpus: Corpus) -> Corpus:
        """Texts by the teacher, written once and kept until the job is done."""
        path = folder.partial / _GENERATED
        if not path.is_file():
            texts = list(generate_texts(self.teacher_source, corpus, self.options, self.show_progress))
            folder.write_text(_GENERATED, json.dumps(texts, ensure_ascii=False))
        return Corpus("text generated by the teacher", tuple(json.loads(path.read_text(encoding="utf-8"))))

    # ---- state ----

    def _save(self, folder: OutputFolder) -> None:
        tensors = {f"weight/{name}": p.detach() for name, p in self.trained.items()}
        for name, p in self.trained.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}/{name}"] = self.optimizer.state[p][key]
        state = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        folder.write_tensors(_CHECKPOINT, {k: v.cpu() for k, v in tensors.items()}, {"trainer": json.dumps(state)})

    def _restore(self, folder: OutputFolder) -> None:
        path = folder.partial / _CHECKPOINT
        if not path.is_file():
            return
        with safe_open(path, framework="pt") as file:
            state = json.loads(file.metadata()["trainer"])
            for name, p in self.trained.items():
                with torch.no_grad():
                    p.copy_(file.get_tensor(f"weight/{name}"))
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": file.get_tensor(f"exp_avg/{name}").to(self.device),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(self.device),
                }
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        logger.warning("%s: going on after step %d", folder.partial, self.step)

    def shard(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of a shard: 0 the embeddings, then the layers, at last norm and head."""
        config = self.source.config
        ends = {0: ("model.embed_tokens.",), config.num_layers + 1: ("model.norm.", "lm_head.")}
        prefixes = ends.get(index, (f"model.layers.{index - 1}.",))
        state = {name: p for name, p in self.model.named_parameters() if name.startswith(prefixes)}
        return {name: p.detach().to(dtype) for name, p in state.items()}


def schedule(progress: float) -> float:
    """Share of the learning rate at a share of the run."""
    if progress < _WARMUP:
        return max(progress / _WARMUP, 0.02)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def hf_module(source: ModelSource) -> Any:
    """The model as a `transformers` module in fp32, weights read from ``source``: no file format of theirs is involved."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            "distill needs transformers: pip install 'fastattn[compress]'", name="transformers"
        ) from error

    raw = hf_config(source.config, torch.float32)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()  # type: ignore[no-untyped-call]
    offset = 1.0 if stores_norms_minus_one(source.config) else 0.0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            read_weight(source, name, parameter.data)
            if offset and name.endswith("norm.weight"):
                parameter.sub_(offset)
    return module


def generate_texts(
    source: ModelSource, corpus: Corpus, options: DistillOptions, show_progress: bool = False
) -> Iterator[str]:
    """``options.generate`` texts of about ``options.length`` tokens that the model writes, each after a few words of ``corpus``."""
    from fastattn.engine.llm import LLM
    from fastattn.engine.sampling_params import SamplingParams

    starts = token_windows(corpus, source.tokenizer(), max(_PROMPT_TOKENS, 2))
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(options.seed)).tolist()
    prompts = [{"prompt_token_ids": starts[order[i % len(order)]].tolist()} for i in range(options.generate)]
    length = max(options.length, _PROMPT_TOKENS + 1)
    llm = LLM(source, device=options.device, max_model_len=length, quiet=not show_progress)
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=length - _PROMPT_TOKENS, ignore_eos=True)
    each = [replace(params, seed=options.seed * 1_000_003 + i) for i in range(options.generate)]
    for prompt, output in zip(prompts, llm.generate(prompts, each, use_tqdm=show_progress), strict=True):
        yield llm.tokenizer.decode(prompt["prompt_token_ids"] + list(output.outputs[0].token_ids))
