"""The built-in page: one file of HTML that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["show_page"]

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def _load() -> tuple[str, str]:
    text = resources.files("dspark.serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _INLINE.findall(text):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; "
        f"style-src {' '.join(hashes['style'])}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


_PAGE, _POLICY = _load()


async def show_page(request: Request) -> Response:
    """GET /."""
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(_PAGE, media_type="text/html", headers=headers)
