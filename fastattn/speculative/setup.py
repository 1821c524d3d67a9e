"""From a speculative config to what runs it. Everything here lives on rank 0, whatever the target's parallelism is."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastattn.engine.config import EngineConfig
from fastattn.engine.runner import Runner
from fastattn.models.config import ModelConfig
from fastattn.models.loader import ModelSource, open_model
from fastattn.models.registry import load_model
from fastattn.models.tokenizer import Tokenizer
from fastattn.speculative.config import SpeculativeConfig
from fastattn.speculative.draft_model import DraftModelProposer, check_same_vocabulary
from fastattn.speculative.proposer import NgramProposer, Proposer
from fastattn.speculative.speculator import Speculator


def open_draft(config: SpeculativeConfig | None) -> ModelSource | None:
    """The draft model's files, if the method has one."""
    return open_model(config.model) if config is not None and config.model is not None else None


def build_speculator(
    config: EngineConfig,
    target: ModelConfig,
    tokenizer: Tokenizer,
    draft: ModelSource | None,
    device: torch.device,
    dtype: torch.dtype,
    show_progress: bool = False,
) -> Speculator | None:
    """config, target, tokenizer: the target's. draft: what `open_draft` gave. Raises ValueError for another vocabulary, before
    any weight is read."""
    options = config.speculative
    if options is None:
        return None
    proposer: Proposer
    if draft is None:
        assert options.prompt_lookup_min is not None and options.prompt_lookup_max is not None
        proposer = NgramProposer(options.prompt_lookup_min, options.prompt_lookup_max)
    else:
        check_same_vocabulary(tokenizer, draft.tokenizer(), draft.name)
        # Static scales are those of the target's heads.
        own = replace(
            config,
            speculative=None,
            max_model_len=draft_model_len(config.max_model_len, draft.config),
            kv_cache_scales="dynamic",
            num_host_kv_blocks=0,
        )
        network = load_model(draft, device, dtype, own.max_model_len, show_progress)
        runner = Runner(network, own, device, dtype)
        proposer = DraftModelProposer(runner, target.vocab_size, options.is_probabilistic)
    return Speculator(options, proposer)


def draft_model_len(max_model_len: int, draft: ModelConfig) -> int:
    """A draft model that ends earlier than the target guesses nothing for longer texts."""
    return min(max_model_len, draft.max_position_embeddings)
