"""A model of two layers with random weights, and a tokenizer for it: the whole engine in a millisecond a step, no download."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers

from fastattn import nn
from fastattn.engine.batch import Batch, decode_shapes
from fastattn.engine.config import EngineConfig
from fastattn.engine.decode_shapes import DecodeShape
from fastattn.engine.engine import Engine
from fastattn.engine.graphs import DecodeGraphs
from fastattn.engine.intake import Params, Prompt
from fastattn.engine.outputs import RequestOutput
from fastattn.engine.runner import Runner
from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import TensorInfo
from fastattn.models.loader.source import expected_shape
from fastattn.models.registry import build_model
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.draft_model import DraftModelProposer
from fastattn.speculative.proposer import NgramProposer, Proposer
from fastattn.speculative.speculator import Speculator

BOS, EOS = 0, 1
# Printable ASCII, the bytes of é and €, so that characters may be cut by tokens, and tokens of several characters.
_BYTES = [*map(chr, range(33, 127)), "Ġ", "Ã", "©", "â", "Ĥ", "¬"]
_MERGES = [("a", "b"), ("t", "h"), ("th", "e"), ("Ġ", "a"), ("0", "0")]
_VOCAB = {text: i for i, text in enumerate(["<s>", "</s>", *_BYTES, *(a + b for a, b in _MERGES)])}
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}>{% endif %}"
)

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=len(_VOCAB),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)


def make_pipeline() -> Pipeline:
    pipeline = Pipeline(models.BPE(vocab=_VOCAB, merges=_MERGES))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens(["<s>", "</s>"])
    return pipeline


def make_tokenizer() -> Tokenizer:
    return Tokenizer(
        make_pipeline(), bos_token_id=BOS, eos_token_ids=(EOS,), add_bos=True, add_eos=False, chat_template=_TEMPLATE
    )


@dataclass(frozen=True)
class TinySource:
    """A ModelSource whose weights come from a generator; the end token is made unlikely, so that texts are long."""

    seed: int = 0
    name: str = "tiny"
    config: ModelConfig = CONFIG

    def tokenizer(self) -> Tokenizer:
        return make_tokenizer()

    def tensors(self) -> Mapping[str, TensorInfo]:
        model = build_model(self.config, torch.device("meta"), torch.float32, 8)
        return {name: TensorInfo(tuple(out.shape), "F32", 4 * out.numel()) for name, out, *_ in model.weights()}

    def read(self, name: str, out: torch.Tensor, shard: nn.Shard | None = None, copier: object = None) -> None:
        shape = expected_shape(out, shard)
        generator = torch.Generator().manual_seed(self.seed * 1000 + sum(map(ord, name)))
        whole = torch.randn(shape, generator=generator) * (0.1 if name.endswith("norm.weight") else 0.4)
        if name.endswith("norm.weight"):
            whole.add_(1)
        out.copy_(whole if shard is None else whole[shard.slices])


def make_engine(
    network: DecoderModel,
    tokenizer: Tokenizer,
    *,
    draft: DecoderModel | None = None,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Engine:
    """A small engine that verifies its bookkeeping after every step. draft: the draft model, with option `speculative`.
    padded: decode steps are what they are with CUDA graphs."""
    defaults = {"max_model_len": 256, "num_kv_blocks": 128, "block_size": 8, "max_num_seqs": 16, "debug_checks": True}
    config = EngineConfig(**(defaults | options))
    runner = Runner(network, config, torch.device("cpu"), dtype)
    if padded:
        runner.graphs = PaddedDecodes(runner)
    return Engine(runner, config, tokenizer, make_speculator(config, network, draft))


class PaddedDecodes(DecodeGraphs):
    """What CUDA graphs do to decode steps, without CUDA: all are padded to few shapes, and read their inputs from the places
    where the first step of that shape had them."""

    def __init__(self, runner: Runner) -> None:
        self.shapes = decode_shapes(runner.config)
        self._decode, self._graphs = runner._decode, {}
        self._logits = None

    def capture(self, shape: DecodeShape, batch: Batch) -> Any:
        result = self._decode(batch, shape.greedy, None)
        if self._logits is None and not shape.greedy:
            self._logits = result.new_full((self.shapes.max_num_tokens, result.shape[1]), float("nan"))
        memory = None if shape.greedy or self._logits is None else self._logits[: shape.num_tokens]
        self._graphs[shape] = SimpleNamespace(replay=lambda: self._decode(batch, shape.greedy, memory))
        self._graphs[shape].replay()
        return self._graphs[shape]


def make_speculator(config: EngineConfig, network: DecoderModel, draft: DecoderModel | None) -> Speculator | None:
    spec = config.speculative
    if spec is None:
        return None
    proposer: Proposer
    if draft is None:
        assert spec.prompt_lookup_min is not None and spec.prompt_lookup_max is not None
        proposer = NgramProposer(spec.prompt_lookup_min, spec.prompt_lookup_max)
    else:
        runner = Runner(
            draft, replace(config, speculative=None, num_host_kv_blocks=0), torch.device("cpu"), torch.float32
        )
        proposer = DraftModelProposer(runner, network.config.vocab_size, spec.is_probabilistic)
    return Speculator(spec, proposer)


def run(engine: Engine, prompts: Sequence[Prompt], params: Params | Sequence[Params]) -> list[RequestOutput]:
    """Adds all at once, runs to the end, and returns the last output of each prompt."""
    every = params if isinstance(params, Sequence) else [params] * len(prompts)
    for index, (prompt, p) in enumerate(zip(prompts, every, strict=True)):
        engine.add_request(str(index), prompt, p)
    last = {output.request_id: output for output in drain(engine)}
    return [last[str(index)] for index in range(len(prompts))]


def drain(engine: Engine) -> list[RequestOutput]:
    """All outputs until nothing is left to do; then every block must be free or cached."""
    outputs = []
    for _ in range(10_000):
        if not engine.has_unfinished_requests():
            break
        outputs += engine.step()
    assert_idle(engine)
    return outputs


def assert_idle(engine: Engine) -> None:
    stats = engine.stats()
    assert not engine.has_unfinished_requests()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert engine.kv.pool.num_free + engine.kv.tree.num_cached == stats.num_kv_blocks == stats.num_usable_kv_blocks
    engine.kv.check()
    assert not engine._groups
    assert not engine._owner
    if engine.speculator is not None:
        assert not engine.speculator._lengths
        proposer = engine.speculator.proposer
        if isinstance(proposer, DraftModelProposer):
            assert not proposer._shadows
            assert proposer.kv.pool.num_free + proposer.kv.tree.num_cached == stats.num_kv_blocks
            proposer.kv.check()
        elif isinstance(proposer, NgramProposer):
            assert not proposer._indexes


def full_logits(network: DecoderModel, token_ids: Sequence[int]) -> torch.Tensor:
    """(T, vocab_size) logits of a whole text in one pass, without the engine."""
    with torch.inference_mode():
        logits: torch.Tensor = network.logits(full_hidden(network, token_ids))
    return logits


def full_hidden(network: DecoderModel, token_ids: Sequence[int]) -> torch.Tensor:
    """(T, hidden_size) final hidden states of a whole text in one pass, without the engine."""
    count, config, weight = len(token_ids), network.config, network.embed_tokens.weight

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=weight.device)

    meta = nn.AttentionMetadata(
        positions=ints(range(count)),
        slot_mapping=ints(range(count)),
        cu_seqlens_q=ints([0, count]),
        seqused_k=ints([count]),
        block_table=ints([0])[None],
        max_seqlen_q=count,
    )
    shape = (2, 1, count, config.num_kv_heads, config.head_dim)
    caches = [tuple(torch.zeros(shape, dtype=weight.dtype, device=weight.device)) for _ in range(config.num_layers)]
    with torch.inference_mode():
        hidden: torch.Tensor = network(ints(token_ids), meta, caches)
    return hidden


def hf_sizes(c: ModelConfig) -> dict[str, Any]:
    """Under the names of Hugging Face's configurations."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
    }


def write_folder(source: TinySource, folder: Path) -> Path:
    """The model as a folder in Hugging Face's layout, for those who open it by its path."""
    c = source.config
    settings = {
        "model_type": "gemma3_text" if c.architecture == "gemma3" else c.architecture,
        **hf_sizes(c),
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {name: torch.empty(info.shape) for name, info in source.tensors().items()}
    for name, tensor in tensors.items():
        source.read(name, tensor)
    save_file(tensors, folder / "model.safetensors")
    make_pipeline().save(str(folder / "tokenizer.json"))
    return folder
