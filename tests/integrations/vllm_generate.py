"""python -m tests.integrations.vllm_generate BACKEND KV_CACHE_DTYPE FOLDER: greedy tokens of a small random model in vLLM.

Prints one line of JSON at the end: for each prompt its tokens and the five highest logits at each.
"""

from __future__ import annotations

import json
import os
import random
import sys
import zlib
from pathlib import Path
from typing import Any

from bench.vllm_backend import text_of

LENGTHS = (1, 3, 17, 63, 65, 129, 257, 700) * 4
NUM_NEW = 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 1024,
    "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def set_weights(model: Any) -> list[str]:
    """Normal ones by name, at a scale at which attention decides the tokens; vLLM's dummy ones give it no say."""
    import torch

    with torch.inference_mode():
        for name, p in model.named_parameters():
            generator = torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))
            if p.dim() == 1:
                p.fill_(1.0)
            else:
                gain = 2.0 if "qkv" in name else 1.0
                p.normal_(0.0, 1.0 if "embed_tokens" in name else gain * p.shape[1] ** -0.5, generator=generator)
    return sorted({type(module.impl).__name__ for module in model.modules() if hasattr(module, "impl")})


def leave_queries_as_they_are() -> None:
    """With a cache of fp8 vLLM rounds queries to fp8 for its backends, which moves a logit of this model by 0.1 (rms), ten times
    what bf16 does: nothing to compare with. Its Triton kernel takes them in bf16 as well."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

    init = TritonAttentionImpl.__init__

    def without_rounding(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.supports_quant_query_input = False

    TritonAttentionImpl.__init__ = without_rounding


def main(backend: str, kv_cache_dtype: str, folder: Path) -> None:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_USE_FLASHINFER_SAMPLER="0")
    from vllm import LLM, SamplingParams, TokensPrompt

    if backend == "TRITON_ATTN":
        leave_queries_as_they_are()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    llm = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048, max_num_seqs=16,
        gpu_memory_utilization=0.2, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False, attention_backend=backend,
        kv_cache_dtype=kv_cache_dtype, logprobs_mode="raw_logits",
    )  # fmt: skip
    impls = llm.apply_model(set_weights)[0]
    rnd = random.Random(0)
    prompts = [TokensPrompt(prompt_token_ids=[rnd.randrange(10, 2000) for _ in range(n)]) for n in LENGTHS]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True, detokenize=False, logprobs=5)
    texts = [text_of(result.outputs[0]) for result in llm.generate(prompts, params, use_tqdm=False)]
    print(json.dumps({"impls": impls, "texts": texts}), flush=True)
    os._exit(0)  # without the end of an engine and its messages


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
