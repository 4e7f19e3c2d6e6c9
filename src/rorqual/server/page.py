"""The chat page: one file, served with a policy that lets it load nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources


@cache
def page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy: the very script and style in it, and this server, nothing
    else.
    """
    body = resources.files("rorqual.server").joinpath("page.html").read_bytes()
    script = _hashes(body, b"script")
    style = _hashes(body, b"style")
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return body, policy


def _hashes(body: bytes, tag: bytes) -> str:
    contents = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", body, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c).digest()).decode()}'" for c in contents)
