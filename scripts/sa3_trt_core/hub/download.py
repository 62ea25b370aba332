"""Download a file of a hub repository into the hub client's cache: resumable, verified by the hub's digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sa3_trt_core.artifacts import locks
from sa3_trt_core.artifacts.files import CHUNK
from sa3_trt_core.console import format_bytes
from sa3_trt_core.errors import ToolError, memory_error
from sa3_trt_core.hub.client_errors import setup_error, start_error, transport_error, tried

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata
    from huggingface_hub.errors import HfHubHTTPError

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256, _GIT = (
    64,
    40,
)  # letters of a digest: SHA-256 of a large file, or git's SHA-1 of header and bytes of a small one
_FORBIDDEN = (401, 403)
_NO_REPOSITORY = 404  # also the status of a private repository without login
_TOO_MANY, _SERVER = 429, 500
_TRANSPORT = "httpx"  # package name prefix of the client's transport (httpx, httpx2)


def _client() -> Any:
    """Import huggingface_hub. Raises ToolError if its environment variables make the import fail."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # reads the variables; a later import would print to stdout
    except (ValueError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        raise setup_error(error) or start_error(error) from None
    return huggingface_hub


def cached(repository: str, name: str, revision: str) -> Path | None:
    """Return the file in the cache, or None. A branch stands for its commit at the last request."""
    cached = _client().try_to_load_from_cache(repository, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def commit_of(path: Path) -> str | None:
    """Return the commit of a file of the cache, from its path .../snapshots/<commit>/..."""
    parts = path.parts
    at = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else len(parts)
    return parts[at + 1] if at + 1 < len(parts) and COMMIT.fullmatch(parts[at + 1]) else None


def expected_sha256(path: Path) -> str | None:
    """Return the hub's SHA-256 of a large file of the cache; None for any other file."""
    blob = path.resolve()
    known = blob.parent.name == "blobs" and len(blob.name) == _SHA256 and commit_of(path) is not None
    return blob.name if known else None


def switched_off() -> bool:
    """Return True if HF_HUB_OFFLINE forbids requests to the hub."""
    return bool(_client().is_offline_mode())


def fetch(repository: str, name: str, revision: str) -> Path | None:
    """Download a file of a repository at a revision into the cache; return its path, None if it does not exist.

    A broken or killed download is resumed by the next call. The file enters the cache only after its size and digest
    match those of the hub. Raises ToolError.
    """
    huggingface_hub = _client()
    huggingface_hub.utils.logging.set_verbosity_error()  # its log lines would mix with the two lines of an error
    with _told(repository, name, revision):
        url = huggingface_hub.hf_hub_url(repository, name, revision=revision)
        try:
            metadata = huggingface_hub.get_hf_file_metadata(url, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT)
        except huggingface_hub.errors.EntryNotFoundError:
            return None
        blob = _blob(repository, name, metadata)
        with locks.exclusive_lock(locks.lock_path(blob), name):
            if not blob.is_file():
                _download(url, name, metadata, blob)
        # The client creates the links of its cache; it finds the blob there and downloads nothing.
        path = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        if not _same_file(path, blob, metadata):
            raise ToolError(f"{repository} changed while {name} was fetched", "run the same command again")
        return path


def _same_file(path: Path, blob: Path, metadata: HfFileMetadata) -> bool:
    """Return True if the client's `path` has the bytes of `blob`: a link to it, or a copy in a cache without links.

    On a disk without links (exFAT, SMB) each file of a commit is a copy, and no blob is kept: the client moves the blob
    there, because twice the bytes would not fit some disks.
    """
    if path.is_symlink():
        return path.resolve() == blob.resolve()
    copied = path.stat().st_size == metadata.size and commit_of(path) == metadata.commit_hash
    if copied:
        blob.unlink(missing_ok=True)
    return copied


def _blob(repository: str, name: str, metadata: HfFileMetadata) -> Path:
    """Return the path of a blob in the cache, named by its digest."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    digest = metadata.etag or ""
    if re.fullmatch(r"[0-9a-f]+", digest) is None or len(digest) not in (_SHA256, _GIT) or metadata.size is None:
        raise ToolError(
            f"{constants.ENDPOINT} sends no size and digest of {name}: it is not a trusted hub",
            "check HF_ENDPOINT and the proxy",
        )
    folder = Path(constants.HF_HUB_CACHE).expanduser().resolve() / repo_folder_name(
        repo_id=repository, repo_type="model"
    )
    return folder / "blobs" / digest


def _download(url: str, name: str, metadata: HfFileMetadata, blob: Path) -> None:
    """Download the rest of a file, verify it, and rename it to its name in the cache."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    size = metadata.size
    assert size is not None and metadata.etag is not None
    partial = blob.with_name(f"{blob.name}.sa3.incomplete")
    have = partial.stat().st_size if partial.is_file() else 0
    if have > size:
        partial.unlink()
        have = 0
    free = shutil.disk_usage(blob.parent).free
    if free < size - have:
        raise ToolError(
            f"{blob.parent} has {format_bytes(free)} free, {name} needs {format_bytes(size - have)}",
            "free some space, or name another disk with HF_HOME",
        )
    headers = build_hf_headers()
    if urlsplit(metadata.location).hostname != urlsplit(url).hostname:
        headers.pop("authorization", None)  # the URL is signed; the storage host must not receive the user's token
    try:
        with partial.open("ab") as file:
            http_get(
                metadata.location,
                file,
                resume_size=have,
                headers=headers,
                expected_size=size,
                displayed_filename=name,
            )
            os.fsync(file.fileno())
    except Exception as error:
        size_is_wrong = isinstance(error, OSError) and error.errno is None  # the client's error for a wrong size
        if not is_transport(error) and not size_is_wrong:
            raise
        if partial.stat().st_size > size:
            partial.unlink()
            raise _spoilt(name, "more bytes than") from None
        kept = format_bytes(partial.stat().st_size)
        raise ToolError(
            f"the connection broke while {name} was fetched; {kept} of {format_bytes(size)} are kept",
            "run the same command again to resume",
        ) from None
    digest = _digest(partial, metadata.etag)
    if digest != metadata.etag:
        partial.unlink()
        raise _spoilt(name, f"digest {digest[:12]}, not the {metadata.etag[:12]} that")
    os.replace(partial, blob)


def _spoilt(name: str, how: str) -> ToolError:
    return ToolError(
        f"{name} arrived with {how} the hub says it has",
        "it was discarded; run the same command again, without a proxy if it happens twice",
    )


def _digest(path: Path, like: str) -> str:
    """Return the digest of a file, of the same kind as `like`."""
    digest = hashlib.sha256() if len(like) == _SHA256 else hashlib.sha1(usedforsecurity=False)
    if len(like) == _GIT:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _told(repository: str, name: str, revision: str) -> Iterator[None]:
    """Convert errors of the client to ToolErrors."""
    from huggingface_hub import errors

    try:
        yield
    except (ToolError, errors.EntryNotFoundError):
        raise
    except errors.RevisionNotFoundError:
        raise ToolError(f"{repository} has no revision {revision}", "choose another `revision`") from None
    except errors.GatedRepoError:
        raise gated(repository) from None
    except errors.HfHubHTTPError as error:
        raise _refused(error, repository, name) from None
    except errors.FileMetadataError as error:
        raise ToolError(f"no hub answers for {name}: {error}", "check HF_ENDPOINT and the proxy") from None
    except (ConnectionError, TimeoutError) as error:
        raise setup_error(error) or unreachable(repository, name) from None
    except OSError as error:
        known = setup_error(error) or memory_error(error)
        raise known or ToolError(
            f"cannot store {name}: {error.strerror or error}", "free disk space or set HF_HOME"
        ) from None
    except Exception as error:
        if is_transport(error):
            words = str(error)
            raise transport_error(words) or unreachable(repository, name, connection=words) from None
        known = setup_error(error)
        if known is None:
            raise
        raise known from None


def is_transport(error: Exception) -> bool:
    """Return True for a connection error; the client does not wrap errors of its transport."""
    return type(error).__module__.startswith(_TRANSPORT)


def _refused(error: HfHubHTTPError, repository: str, name: str) -> ToolError:
    status = error.response.status_code
    if status in _FORBIDDEN or status == _NO_REPOSITORY:
        return gated(repository)
    if status == _TOO_MANY:
        wait = error.response.headers.get("Retry-After", "")
        pause = f"wait {wait} seconds" if wait.isdigit() else "wait some minutes"
        return ToolError(
            "the hub answered 429: too many requests from here", f"{pause}; after hf auth login the limit is higher"
        )
    when = "try again later" if status >= _SERVER else "check HF_ENDPOINT and the proxy"
    return ToolError(f"the hub answered {status} for {repository}/{name}", when)


def gated(repository: str) -> ToolError:
    """Return the ToolError of a repository that is missing, private or gated."""
    return ToolError(
        f"no access to {repository} on the hub",
        f"accept its licence at https://huggingface.co/{repository}, then run: hf auth login",
    )


def unreachable(repository: str, name: str, off: str | None = None, connection: str = "") -> ToolError:
    """Return the ToolError of a file missing in the cache while the hub is unreachable, or switched off by `off`.

    `connection` is the error of the transport.
    """
    why = f"the hub is switched off ({off})" if off else f"the hub cannot be reached{tried(connection)}"
    return ToolError(
        f"{repository}/{name} is not in the cache and {why}",
        "connect to the network once, or give `onnx_root=ROOT` with your own files",
    )
