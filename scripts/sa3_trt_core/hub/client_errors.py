"""ToolErrors for a misconfigured hub client: proxies, certificates, tokens and environment variables."""

from __future__ import annotations

import os
from pathlib import Path

from sa3_trt_core.errors import ToolError

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
MAX_REASON_LENGTH = 160


def setup_error(error: BaseException) -> ToolError | None:
    """Return the ToolError of an unusable proxy configuration; None for other errors."""
    words = _words(error)
    if isinstance(error, UnicodeEncodeError):
        return _no_token("characters outside ASCII")
    known = transport_error(words)
    if known is not None:
        return known
    missing = _missing_certificates()
    if missing and isinstance(error, OSError | ValueError) and not isinstance(error, ConnectionError | TimeoutError):
        return certificate_error(words)
    if isinstance(error, ImportError) and "socks" in words.lower():
        return ToolError(
            f"the proxy {_set(PROXIES)} needs a package that is not installed: {words}",
            "pip install socksio, or unset the proxy",
        )
    if isinstance(error, ValueError | ImportError) and ("proxy" in words.lower() or "scheme" in words.lower()):
        return ToolError(
            f"the proxy {_set(PROXIES)} cannot be used: {words}",
            "write it as http://, https:// or socks5://host:port, or unset it",
        )
    return None


def transport_error(words: str) -> ToolError | None:
    """Return the ToolError of a connection that failed by certificates or token; None for other errors."""
    if "certificate" in words.lower() or "[SSL" in words:
        return certificate_error(words)
    if "header value" in words.lower():
        return _no_token("a line break or another control character")
    return None


def tried(words: str) -> str:
    """Return " (address through proxies: error of the transport)" for messages about an unreachable hub."""
    from huggingface_hub import constants

    through = _set(PROXIES)
    reason = f": {words}" if words else ""
    return f" ({_without_password(constants.ENDPOINT)}{f' through {through}' if through else ''}{reason})"


def _no_token(what: str) -> ToolError:
    return ToolError(
        f"the hub's token is invalid: it holds {what}",
        "set HF_TOKEN to the token that the hub gave you, or unset it and run: hf auth login",
    )


def start_error(error: BaseException) -> ToolError:
    """Return the ToolError of a failed import of the client, which reads its environment variables at import."""
    return ToolError(
        f"the hub's client cannot start: {_words(error)}", "check the HF_... variables of your environment"
    )


def certificate_error(words: str) -> ToolError:
    """Return the ToolError of certificates that are missing, unreadable, or do not verify the hub."""
    missing = _missing_certificates()
    if missing:
        return ToolError(f"{missing} names missing certificates", "correct the path, or unset it")
    named = _set(CERTIFICATES)
    return ToolError(
        f"the hub's certificate is not accepted{f' with {named}' if named else ''}: {words}",
        "set SSL_CERT_FILE to your network's certificates, and check the clock of this machine",
    )


def _missing_certificates() -> str:
    """Return "VARIABLE=path" of the first variable with missing certificates, else ""."""
    for name in CERTIFICATES:
        path = os.environ.get(name)
        if path and not os.access(Path(path), os.R_OK):
            return f"{name}={path}"
    return ""


def _set(names: tuple[str, ...]) -> str:
    """Format those of the variables that are set as VARIABLE=value, without a proxy's password."""
    proxies = []
    for name in names:
        for spelt in dict.fromkeys((name, name.lower())):
            value = os.environ.get(spelt)
            if value:
                proxies.append(f"{spelt}={_without_password(value)}")
    return ", ".join(proxies)


def _without_password(address: str) -> str:
    scheme, mark, rest = address.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}" if mark else address.rpartition("@")[2]


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= MAX_REASON_LENGTH else f"{text[:MAX_REASON_LENGTH]}..."
