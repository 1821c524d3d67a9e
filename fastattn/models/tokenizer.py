"""Text to token ids and back, on Hugging Face's `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Pipeline
from tokenizers.decoders import DecodeStream

from fastattn.models.chat_template import ChatTemplate, ChatTemplateError
from fastattn.models.control_tokens import MARK, Marker, find_control_tokens


def _byte_of() -> dict[str, int]:
    """The characters that byte-level vocabularies write for bytes: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _decoder_json(pipeline: Pipeline) -> str:
    state = pipeline.decoder.__getstate__() if pipeline.decoder is not None else b""
    return state.decode() if isinstance(state, bytes) else str(state)


class _TokenBytes(dict[int, bytes]):
    """What each token adds to a byte-level text, by its id; looked up when it is first met."""

    def __init__(self, pipeline: Pipeline, skip_special_tokens: bool) -> None:
        self._pipeline = pipeline
        added = pipeline.get_added_tokens_decoder() if skip_special_tokens else {}
        super().__init__({token_id: b"" for token_id, token in added.items() if token.special})

    def __missing__(self, token_id: int) -> bytes:
        piece = str(
            self._pipeline.id_to_token(token_id) or ""
        )  # a model's vocabulary may be wider than the tokenizer's
        known = _BYTE_OF.keys() >= set(piece)
        self[token_id] = found = bytes(_BYTE_OF[char] for char in piece) if known else piece.encode()
        return found


class ByteStream:
    """As `TokenStream`, with the same pieces, where the text is no more than the tokens' bytes one after the other: so it takes
    a third of the time, and many tokens at once a twentieth."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes = token_bytes
        self._rest = b""

    def step(self, token_id: int) -> str | None:
        """The text that became complete with this token, or None."""
        data = self._rest + self._bytes[token_id]
        text = data.decode(errors="replace")
        if text.endswith("\ufffd"):
            self._rest = data
            return None
        self._rest = b""
        return text or None

    def steps(self, token_ids: Sequence[int]) -> str:
        """The text that became complete with these tokens."""
        data = self._rest + b"".join(map(self._bytes.__getitem__, token_ids))
        text = data.decode(errors="replace")
        if text.endswith("\ufffd"):  # which token the last whole character ended with is not seen at once
            return "".join(piece for token_id in token_ids if (piece := self.step(token_id)))
        self._rest = b""
        return text


class TokenStream:
    """Text of tokens that come one by one. Holds back bytes that do not make a whole character yet."""

    def __init__(self, pipeline: Pipeline, skip_special_tokens: bool) -> None:
        self._pipeline = pipeline
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str | None:
        """The text that became complete with this token, or None."""
        piece: str | None = self._stream.step(self._pipeline, token_id)
        return piece

    def steps(self, token_ids: Sequence[int]) -> str:
        """The text that became complete with these tokens."""
        return "".join(piece for token_id in token_ids if (piece := self.step(token_id)))


class Tokenizer:
    """bos_token_id, eos_token_ids: the ids that begin and end a text. add_bos, add_eos: whether encoding adds them."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        add_bos: bool,
        add_eos: bool,
        chat_template: str | None,
    ) -> None:
        self._pipeline = pipeline
        self.bos_token_id, self.eos_token_ids = bos_token_id, eos_token_ids
        self._prefix = [bos_token_id] if add_bos and bos_token_id is not None else []
        self._suffix = list(eos_token_ids[:1]) if add_eos else []
        self._template = ChatTemplate(chat_template) if chat_template else None
        self._control = find_control_tokens(pipeline, chat_template)
        self._marker = Marker(frozenset(self._control.values()))
        self._added = frozenset(pipeline.get_added_tokens_decoder())
        decoder = _decoder_json(pipeline)
        self._is_byte_level = '"ByteLevel"' in decoder
        self._is_all_bytes = self._is_byte_level and json.loads(decoder)["type"] == "ByteLevel"
        self._token_bytes: dict[bool, _TokenBytes] = {}  # by whether special tokens have none

    @property
    def vocab_size(self) -> int:
        size: int = self._pipeline.get_vocab_size(with_added_tokens=True)
        return size

    def vocabulary(self) -> dict[str, int]:
        """Every token, special ones too, with its id."""
        tokens: dict[str, int] = self._pipeline.get_vocab(with_added_tokens=True)
        return tokens

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        add_special_tokens: begin with BOS (end with EOS) where the model wants it. parse_special: special tokens that are
        spelled out in the text become those tokens; off for text that comes from a stranger. Any thread may call.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode: text is a {type(text).__name__}, expected a string")
        # Lone surrogates are no text; the library would panic on them.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = (
            self._pipeline.encode(text, add_special_tokens=False).ids if parse_special else self._encode_literally(text)
        )
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    @cached_property
    def _literal(self) -> Pipeline:
        """A twin to which control tokens are text. Switching one pipeline to and fro would not do for several threads."""
        parts = json.loads(self._pipeline.to_str())
        for token in parts["added_tokens"]:
            token["special"] = token["special"] or token["id"] in self._control
        twin = Pipeline.from_str(json.dumps(parts))
        twin.encode_special_tokens = True
        return twin

    def _encode_literally(self, text: str) -> list[int]:
        ids: list[int] = []
        for token_id in self._literal.encode(text, add_special_tokens=False).ids:
            if token_id in self._control:  # merged from its letters, as some vocabularies allow
                for char in self._control[token_id]:
                    ids += self._literal.encode(char, add_special_tokens=False).ids
            else:
                ids.append(token_id)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._pipeline.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> TokenStream | ByteStream:
        if not self._is_all_bytes:
            return TokenStream(self._pipeline, skip_special_tokens)
        if skip_special_tokens not in self._token_bytes:
            self._token_bytes[skip_special_tokens] = _TokenBytes(self._pipeline, skip_special_tokens)
        return ByteStream(self._token_bytes[skip_special_tokens])

    def parts(self) -> dict[str, Any]:
        """What another process needs to make the same tokenizer, see `from_parts`. Plain values, the pipeline as JSON."""
        return {
            "pipeline": self._pipeline.to_str(),
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            "add_bos": bool(self._prefix),
            "add_eos": bool(self._suffix),
            "chat_template": self._template.source if self._template is not None else None,
        }

    @classmethod
    def from_parts(cls, *, pipeline: str, eos_token_ids: Sequence[int], **rest: Any) -> Tokenizer:
        return cls(Pipeline.from_str(pipeline), eos_token_ids=tuple(eos_token_ids), **rest)

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own bytes, which may be a part of a character."""
        piece = self._pipeline.id_to_token(token_id)
        if piece is None:  # the model's vocabulary may be padded beyond the tokenizer's
            return b""
        if token_id in self._added:
            return str(piece).encode()
        if self._is_byte_level:
            return bytes(_BYTE_OF[char] for char in piece) if _BYTE_OF.keys() >= set(piece) else str(piece).encode()
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return str(piece).replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token by itself; where it is a part of a character, U+FFFD stands for it."""
        return self.decode([token_id], skip_special_tokens=False)

    def to_json(self) -> str:
        """The pipeline in the form of tokenizer.json."""
        text: str = self._pipeline.to_str()
        return text

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def chat_token_ids(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The conversation as the model was trained to read it. Control tokens come from the template alone: one that is
        spelled out in a message, or put together from several, stays text. Raises ChatTemplateError."""
        return self.encode_chat(self.render_chat(messages, add_generation_prompt, **variables))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The first half of `chat_token_ids`: a text for `encode_chat` alone, with marks in it."""
        marked, variables = self._marker.mark(list(messages)), self._marker.mark(variables)
        return self.apply_chat_template(marked, add_generation_prompt, **variables)

    def encode_chat(self, text: str) -> list[int]:
        """The second half of `chat_token_ids`."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        encoding = self._pipeline.encode(text, add_special_tokens=False)
        if MARK not in text:
            whole: list[int] = encoding.ids
            return whole
        # Between two control tokens of the template a section is as it is, or, with marks in it, all text.
        ids: list[int] = []
        first, at = 0, 0

        def add_section(end_token: int, end_char: int) -> None:
            section = text[at:end_char]
            if MARK in section:
                ids.extend(self._encode_literally(section.replace(MARK, "")))
            else:
                ids.extend(encoding.ids[first:end_token])

        for index, (token_id, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
            if token_id in self._control and text[start:end].strip() == self._control[token_id].strip():
                add_section(index, start)
                ids.append(token_id)
                first, at = index + 1, end
        add_section(len(encoding.ids), len(text))
        return ids

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as text, as the template writes it. Raises ChatTemplateError. For a model's prompt take
        `chat_token_ids`: in a text nobody can tell the template's control tokens from those that a message spells out."""
        if self._template is None:
            raise ChatTemplateError("this model has no chat template: it completes text, and was not trained to answer")
        special = {
            "bos_token": "" if self.bos_token_id is None else self._pipeline.id_to_token(self.bos_token_id),
            "eos_token": self._pipeline.id_to_token(self.eos_token_ids[0]) if self.eos_token_ids else "",
        }
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, **special, **variables)
