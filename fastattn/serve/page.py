"""The page at /: a chat and live charts, as files of this package. It asks nothing of any other server, and may not.

The page's text is written to the document as text alone: nothing that a model says becomes markup or script. The policy below
makes the browser hold us to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).parent / "static"

# Scripts and styles from here only, none inline; no string becomes HTML (trusted types); nobody puts the page in a frame.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # asked for anew each time, answered with 304 while it is the same
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Asset:
    content: bytes
    media_type: str
    etag: str


def load_assets(folder: Path = FOLDER) -> dict[str, Asset]:
    """Path below the folder → file. All are in memory from the start, so no request ever names a file of the disk."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(folder).as_posix()] = Asset(content, _TYPES[path.suffix], etag)
    return found


def page_routes() -> list[BaseRoute]:
    """GET / and GET /static/…, for any Starlette or FastAPI app. Whether they need a key is the app's to say."""
    assets = load_assets()
    return [Route("/" if name == "index.html" else f"/static/{name}", _serve(asset)) for name, asset in assets.items()]


def _serve(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    headers = {**_HEADERS, "etag": asset.etag}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == asset.etag:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, media_type=asset.media_type, headers=headers)

    return serve
