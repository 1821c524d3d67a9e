"""Which requests have the same answer: those that agree in everything."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from fastattn.serve.protocol import ChatCompletionRequest, CompletionRequest

# They change how an answer is sent, not what it is. Everything else is in the key by construction: a field that is new in
# the protocol is in it without a line here.
DELIVERY = frozenset({"stream", "stream_options"})
_FORM = 1  # of the key and of what is stored under it


def request_key(
    request: ChatCompletionRequest | CompletionRequest,
    fingerprint: str,
    tenant: str,
    request_headers: Mapping[str, str],
) -> bytes:
    """32 bytes. fingerprint: of what answers this request (weights, template, version). request_headers: those that the
    router looks at.

    Raises UnicodeEncodeError for text that is not Unicode (lone surrogates).
    """
    headers = dict(sorted(request_headers.items()))
    return canonical_hash(type(request).__name__, fields_of(request), fingerprint, tenant, headers)


def fields_of(request: ChatCompletionRequest | CompletionRequest) -> dict[str, Any]:
    """Every field with its default. Objects keep the order of the client's keys: a tool's properties reach the model in
    that order, so another order may have another answer."""
    return request.model_dump(mode="json", by_alias=True, exclude=set(DELIVERY))


def canonical_hash(*parts: Any) -> bytes:
    return hashlib.sha256(msgspec.json.encode([_FORM, *parts])).digest()
