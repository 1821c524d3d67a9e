"""Sleep gives memory back, and who wakes answers as before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastattn.engine.llm import LLM
from fastattn.engine.sampling_params import SamplingParams
from fastattn.engine.sleep import AsleepError
from tests.engine.tiny import CONFIG, TinySource, write_folder

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = {"prompt_token_ids": list(range(5, 45))}
SIZES = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "num_kv_blocks": 12, "debug_checks": True}


def tokens(llm: LLM) -> list[int]:
    return list(llm.generate(PROMPT, PARAMS, use_tqdm=False)[0].outputs[0].token_ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "int8", "kv_offloading_size": 0.001},
        {"kv_cache_dtype": "fp8", "kv_cache_scales": "calculate"},
    ],
)
def test_answers_are_the_same_after_a_sleep(options: dict[str, Any]) -> None:
    source = TinySource(config=replace(CONFIG, head_dim=16))
    llm = LLM(source, quiet=True, **SIZES, **options)
    before, runner = tokens(llm), llm.engine.runner
    for level in (1, 2):
        weight = runner.model.embed_tokens.weight
        llm.sleep(level)
        assert llm.engine.is_sleeping and runner.kv_memory.values.untyped_storage().nbytes() == 0
        assert runner.model.embed_tokens.weight.is_meta == (level == 2)
        with pytest.raises(AsleepError, match="add_request: the engine sleeps, wake_up comes first"):
            tokens(llm)
        assert llm.engine.step() == [] and not llm.engine.has_unfinished_requests()
        with pytest.raises(AsleepError, match=f"sleeps already, at level {level}"):
            llm.sleep()
        llm.wake_up()
        assert not llm.engine.is_sleeping
        assert (runner.model.embed_tokens.weight is weight) == (level == 1)
        hits = llm.engine.stats().num_prefix_hit_tokens
        assert tokens(llm) == before
        assert llm.engine.stats().num_prefix_hit_tokens == hits  # what the cache held is forgotten
    with pytest.raises(ValueError, match="wake_up: the engine does not sleep"):
        llm.wake_up()


def test_what_cannot_sleep_says_why(tmp_path: Path) -> None:
    llm = LLM(TinySource(), quiet=True, **SIZES)
    for level in (0, 3, True, "1"):
        with pytest.raises(ValueError, match=f"level is {level!r}, allowed is 1 or 2"):
            llm.sleep(level)  # type: ignore[arg-type]
    llm.engine.add_request("a", PROMPT, PARAMS)
    with pytest.raises(RuntimeError, match="sleep: 1 requests are not finished, allowed are 0"):
        llm.sleep()
    llm.engine.abort_request("a")
    llm.sleep()
    llm.wake_up()
    folder = str(write_folder(TinySource(), tmp_path))
    drafting = LLM(folder, quiet=True, **SIZES, speculative_config={"method": "draft_model", "model": folder})
    with pytest.raises(RuntimeError, match="sleep: there is a draft model"):
        drafting.sleep()


def test_who_cannot_wake_up_sleeps_on_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(TinySource(), quiet=True, **SIZES)
    before, engine = tokens(llm), llm.engine
    llm.sleep(level=2)
    with pytest.raises(ValueError, match="wake_up: tags has 'kv', allowed are 'weights' and 'kv_cache'"):
        llm.wake_up(["kv"])
    with monkeypatch.context() as patch:
        patch.setattr(TinySource, "read", lambda *_: (_ for _ in ()).throw(OSError("no such file")))
        with pytest.raises(OSError, match="no such file"):
            llm.wake_up()
    assert engine.is_sleeping and engine.asleep == ("weights", "kv_cache")
    llm.wake_up(["kv_cache"])
    with pytest.raises(AsleepError):
        tokens(llm)
    assert engine.asleep == ("weights",)
    llm.wake_up(["kv_cache", "weights"])
    assert not engine.is_sleeping and tokens(llm) == before
