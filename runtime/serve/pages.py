"""The pages for a browser: files of this package, whole, with nothing from elsewhere, and headers that hold them to it."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib import resources

from starlette.responses import Response


@lru_cache(maxsize=4)
def _read(name: str) -> tuple[bytes, str]:
    """(a page's bytes, the policy that lets its own script and style run and nothing else load)."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    kinds = {f"{tag}-src": [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
                            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)] for tag in ("script", "style")}
    own = "; ".join(f"{kind} {' '.join(hashes)}" for kind, hashes in kinds.items() if hashes)
    return text.encode(), f"default-src 'none'; {own}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def respond(name: str) -> Response:
    """The page `name`."""
    content, policy = _read(name)
    return Response(content, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
                                                                           "Cache-Control": "no-cache"})
