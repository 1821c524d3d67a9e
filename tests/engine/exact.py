"""Greedy tokens of Hugging Face transformers in fp32 on the CPU, and the comparison with them that near ties cannot hide in.

A greedy continuation is the one text in which every token is the argmax of the model after all tokens before it. So ours is
judged in one forward pass over all of it, not in 64; that this is what transformers' own generation says is another test.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.models.decoder import DecoderModel
from fastattn.models.loader import ModelSource
from fastattn.models.tokenizer import Tokenizer
from tests.engine.tiny import hf_sizes

# Two logits closer than this may change places by the order in which sums are added.
NEAR_TIE = 1e-4


def hf_model(source: ModelSource) -> Any:
    """A transformers model in fp32 with our loader's weights (that they equal transformers' own is another test's)."""
    import transformers

    c = source.config
    sizes = hf_sizes(c)
    if c.architecture == "gemma3":
        assert c.rope_local is not None
        config = transformers.Gemma3TextConfig(
            **sizes,
            layer_types=["sliding_attention" if sliding else "full_attention" for sliding in c.layer_is_sliding],
            sliding_window=c.sliding_window,
            query_pre_attn_scalar=round(c.softmax_scale**-2),
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": c.rope.theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_local.theta},
            },
        )
        model = transformers.Gemma3ForCausalLM(config)
    else:
        rope = {"rope_type": "default", "rope_theta": c.rope.theta}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope))
    state, stored = model.float().eval().state_dict(), source.tensors()
    for name in stored:
        source.read(name, state[name])
        if c.architecture == "gemma3" and name.endswith("norm.weight") and not c.norm_plus_one:
            state[name].sub_(1)  # transformers adds it in the forward pass
    assert set(state) - set(stored) <= {"lm_head.weight"}  # tied
    return model


@dataclass
class Exact:
    """A model of ours with the transformers model that judges it. prompts are token ids."""

    source: ModelSource
    network: DecoderModel
    tokenizer: Tokenizer
    judge: Any
    prompts: list[list[int]]
    num_tokens: int
    near_ties: set[str] = field(default_factory=set)
    _greedy: dict[int, list[int]] = field(default_factory=dict)

    def logits(self, token_ids: Sequence[int], last: int) -> torch.Tensor:
        """(last + 1, vocab_size): of transformers, after each of the tokens from the one before the last ``last`` on."""
        with torch.inference_mode():
            out = self.judge(torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=last + 1)
        logits: torch.Tensor = out.logits[0]
        return logits

    def compare(self, index: int, tokens: list[int]) -> None:
        """Fails, with position and logits, unless the tokens are transformers'. A token that differs at a near tie is
        warned of, and what follows it is judged as a continuation of it."""
        known = self._greedy.get(index, [])
        if tokens == known[: len(tokens)]:
            return
        logits = self.logits(self.prompts[index] + tokens, len(tokens))
        if tokens == logits[:-1].argmax(-1).tolist():
            self._greedy[index] = tokens
            return
        for position, token in enumerate(tokens):
            best = int(logits[position].argmax())
            gap = float(logits[position, best] - logits[position, token])
            if token == best:
                continue
            what = f"prompt {index}, token {position}: ours is {token}, transformers' {best}, its logit is {gap:.2e} higher"
            assert gap < NEAR_TIE, what
            self.near_ties.add(what)
            warnings.warn(f"near tie: {what}", stacklevel=2)
        assert len(self.near_ties) <= 2, self.near_ties
