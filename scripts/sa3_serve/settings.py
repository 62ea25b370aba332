"""Limits and options of a server."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from pathlib import Path

from sa3_trt_core import shapes
from sa3_trt_core.errors import ToolError

MIN_TOKEN_LENGTH, MAX_TOKEN_LENGTH = 16, 1024  # characters
_TOKEN = re.compile(r"[\x21-\x7e]+")  # characters that need no escape in an Authorization header


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a server.

    `depth`: slots of the ring. `max_waiting`: length of the queue, beyond which requests get 429. `max_seconds`,
    `max_steps`: limits of a sound. `max_body`: bytes of a request body, received within `body_seconds`.
    `drain_seconds`: time to finish accepted requests at shutdown. `window`: latent frames per chunk of ?stream=1.
    `token_digest`: SHA-256 of the bearer token (None: no token). `local`: refuse requests for other host names.
    `text_only`: refuse requests with a sound, for a server without audio encoder.
    """

    depth: int = 4
    max_waiting: int = 64
    max_seconds: float = shapes.MAX_SECONDS
    max_steps: int = 100
    max_body: int = 64 << 20
    body_seconds: float = 30.0
    drain_seconds: float = 60.0
    window: int = 128
    token_digest: bytes | None = None
    local: bool = True
    log_prompts: bool = False
    text_only: bool = False

    def admits(self, authorization: bytes | None) -> bool:
        """Return True if an Authorization header has the token; compared in constant time."""
        if self.token_digest is None:
            return True
        scheme, _, token = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        return hmac.compare_digest(digest, self.token_digest) and scheme.lower() == b"bearer"


def read_token(path: Path) -> bytes:
    """Return the SHA-256 of the token in a file, its only line. Raises ToolError."""
    hint = "make one, for example: python -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_TOKEN_LENGTH + 2).decode("ascii").strip()
    except OSError as error:
        raise ToolError(f"cannot read --token-file {path}: {error.strerror or error}", hint) from None
    except UnicodeDecodeError:
        text = ""
    if not MIN_TOKEN_LENGTH <= len(text) <= MAX_TOKEN_LENGTH or not _TOKEN.fullmatch(text):
        raise ToolError(
            f"--token-file {path} holds no token: {MIN_TOKEN_LENGTH} to {MAX_TOKEN_LENGTH} ASCII characters, no blanks",
            hint,
        )
    return hashlib.sha256(text.encode("ascii")).digest()
