"""API keys: who asks, for whom, and what they may. Only digests are kept; every key is compared, in constant time."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from fastattn.serve.contract import APIError
from fastattn.serve.yaml_file import load_yaml

Scope = Literal["inference", "metrics", "admin"]
_ALL: tuple[Scope, ...] = ("inference", "metrics", "admin")


@dataclass(frozen=True)
class ApiKey:
    """bucket: whose rate limits it counts against, of its own if it has limits, else its tenant's."""

    digest: bytes
    name: str = ""
    tenant: str = ""
    scopes: frozenset[Scope] = frozenset(_ALL)
    priority: int = 0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def bucket(self) -> tuple[str, str]:
        has_own = self.requests_per_minute is not None or self.tokens_per_minute is not None
        return ("key", self.name) if has_own else ("tenant", self.tenant)


NOBODY = ApiKey(digest=b"")  # asks where no keys are set


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    tenant: Annotated[str, Field(max_length=64)] | None = None
    scopes: list[Scope] = ["inference"]
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: Annotated[list[_Entry], Field(min_length=1, max_length=100_000)]


class Keys:
    """Empty: nobody is asked for a key."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, token: str | None) -> ApiKey:
        """Whose token this is. Raises APIError 401."""
        if not self._keys:
            return NOBODY
        if token is None:
            raise _unauthorized("an API key is needed: Authorization: Bearer KEY")
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:  # all of them: how long it takes says nothing about which
            if hmac.compare_digest(digest, key.digest):
                found = key
        if found is None:
            raise _unauthorized("the API key is not valid")
        return found


def _unauthorized(text: str) -> APIError:
    headers = {"WWW-Authenticate": "Bearer"}
    return APIError(401, text, "authentication_error", code="invalid_api_key", headers=headers)


def token_of(authorization: str | None) -> str | None:
    """The key in an Authorization header: a bearer token, or the password with which a browser opens the page at /."""
    scheme, _, value = (authorization or "").strip().partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return None if not scheme else ""


def load_keys(plain: Sequence[SecretStr], file: Path | None) -> Keys:
    """Keys given as they are have all scopes. Raises ValueError that names the file and what is wrong, and shows no key."""
    digests = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in plain]
    return Keys([ApiKey(digest, f"api-key-{i}") for i, digest in enumerate(digests)] + _read(file))


def _read(file: Path | None) -> list[ApiKey]:
    if file is None:
        return []
    try:
        entries = _File.model_validate(load_yaml(file.read_text(encoding="utf-8"))).keys
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False))
        raise ValueError(f"api_keys_file: {file}: {wrong}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"api_keys_file: {file}: {' '.join(str(error).split())}") from None
    names = [entry.name for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"api_keys_file: {file}: the name {twice!r} is there twice")
    return [
        ApiKey(
            bytes.fromhex(entry.sha256),
            entry.name,
            entry.name if entry.tenant is None else entry.tenant,
            frozenset(entry.scopes),
            entry.priority,
            entry.requests_per_minute,
            entry.tokens_per_minute,
        )
        for entry in entries
    ]
