"""Compiled grammars by themselves: masks, drafts, tokenizers, the cache."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, normalizers

from fastattn import StructuredOutput
from fastattn.engine.grammar import GrammarCompiler, GrammarMasks
from fastattn.models.tokenizer import Tokenizer
from tests.engine.tiny import EOS

pytestmark = pytest.mark.usefixtures("one_thread")


def masks_of(compiler: GrammarCompiler, wish: StructuredOutput, vocab_size: int, drafts: list[int]) -> list[set[int]]:
    masks = GrammarMasks().fill([(compiler.compile(wish), drafts)], vocab_size, pin=False)
    bits = (masks.unsqueeze(2) >> torch.arange(32, dtype=torch.int32)) & 1
    return [set(row.nonzero().flatten().tolist()) for row in bits.flatten(1)]


def test_ids_past_the_vocabulary_are_never_allowed(tokenizer: Tokenizer) -> None:
    """The logits may be wider than the vocabulary; nothing past it, nor past the logits, may be drawn."""
    for vocab_size in (tokenizer.vocab_size, tokenizer.vocab_size + 21, 1024):
        (allowed,) = masks_of(
            GrammarCompiler(tokenizer, vocab_size), StructuredOutput("regex", "(.|\\n)*"), vocab_size, []
        )
        assert allowed <= set(range(tokenizer.vocab_size))
        assert EOS in allowed
        assert 0 not in allowed  # <s> is no text
        assert len(allowed) > 90


def test_drafts(tokenizer: Tokenizer) -> None:
    """What speculation needs: how many drafts fit, the mask after each, and the way back."""
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    wish = StructuredOutput("regex", "x(y|z)9+")
    x, y, nine, q = (tokenizer.encode(text, add_special_tokens=False)[0] for text in "xy9q")
    assert [len(mask) for mask in masks_of(compiler, wish, tokenizer.vocab_size, [x, y, nine])] == [1, 2, 1, 2]
    grammar = compiler.compile(wish)
    assert grammar.num_valid([x, y, nine, nine]) == 4
    assert grammar.num_valid([x, q, nine]) == 1
    assert not grammar.accepting
    for token in (x, y, nine):
        grammar.accept(token)
    assert grammar.accepting
    grammar.rollback(2)
    assert not grammar.accepting
    assert grammar.num_valid([nine]) == 0
    assert grammar.num_valid([y]) == 1


def test_a_sentencepiece_tokenizer() -> None:
    """Blanks are ▁ and rare characters are bytes there; that is not what the grammar must see."""
    words = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", '"', ":"]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")]
    pipeline = Pipeline(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Replace(" ", "▁")
    pipeline.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(pipeline, bos_token_id=1, eos_token_ids=(2,), add_bos=True, add_eos=False, chat_template=None)
    size = tokenizer.vocab_size
    compiler = GrammarCompiler(tokenizer, size)

    def allowed(pattern: str, so_far: list[int]) -> set[str]:
        masks = masks_of(compiler, StructuredOutput("regex", pattern), size, so_far)
        return {pipeline.id_to_token(token) for token in masks[-1]}

    assert allowed(" ab", []) == {"▁", "▁a", "▁ab", "<0x20>"}
    assert allowed(" ab", [vocabulary["▁a"]]) == {"b", "<0x62>"}
    assert allowed("é", []) == {"<0xC3>"}
    assert allowed("é", [vocabulary["<0xC3>"]]) == {"<0xA9>"}
    assert allowed("a+", [vocabulary["a"]]) == {"a", "<0x61>", "</s>"}


def test_a_grammar_is_compiled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    tasks: list[str] = []
    check = compiler._sandbox.run
    monkeypatch.setattr(compiler._sandbox, "run", lambda lark: tasks.append(lark) or check(lark))
    monkeypatch.setattr("fastattn.engine.grammar.CACHE_BYTES", 70)
    patterns = [f"{letter}{{1,{size}}}" + "x" * 25 for letter in "abc" for size in (3, 3)]
    for pattern in [*patterns, patterns[2], patterns[0]]:
        compiler.compile(StructuredOutput("regex", pattern))
    assert len(tasks) == 4  # three, and the first again, which had to go
    assert compiler._cache_bytes <= 70


def test_without_llguidance(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'fastattn\[server\]'"):
        GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(StructuredOutput("regex", "a"))
