"""One file of a hub repository into the hub client's own cache: resumed, checked against the hub's digest."""

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
)  # letters of a digest: of a large file its SHA-256, of a small one git's SHA-1 of header and bytes
_FORBIDDEN = (401, 403)
_NO_REPOSITORY = 404  # also the hub's answer for a private one without a login
_TOO_MANY, _SERVER = 429, 500
_TRANSPORT = "httpx"  # the client's transport, whichever release of it: httpx, httpx2


def _client() -> Any:
    """Return the module huggingface_hub. Raises ToolError where its own variables keep it from being imported."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # reads the variables, and is else imported late, with words on stdout
    except (ValueError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        raise setup_error(error) or start_error(error) from None
    return huggingface_hub


def cached(repository: str, name: str, revision: str) -> Path | None:
    """Return the file in the cache, or None. A branch is the commit that it was when it was last asked for."""
    cached = _client().try_to_load_from_cache(repository, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None


def commit_of(path: Path) -> str | None:
    """Return the commit that a file of the cache belongs to: .../snapshots/<commit>/..."""
    parts = path.parts
    at = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else len(parts)
    return parts[at + 1] if at + 1 < len(parts) and COMMIT.fullmatch(parts[at + 1]) else None


def expected_sha256(path: Path) -> str | None:
    """Return the SHA-256 that the hub stated for a large file of the cache; None for any other file."""
    blob = path.resolve()
    known = blob.parent.name == "blobs" and len(blob.name) == _SHA256 and commit_of(path) is not None
    return blob.name if known else None


def switched_off() -> bool:
    """Return True if HF_HUB_OFFLINE forbids requests to the hub."""
    return bool(_client().is_offline_mode())


def fetch(repository: str, name: str, revision: str) -> Path | None:
    """Return one file of a repository at a revision, in the cache; None if the repository has no such file.

    What was read before a connection broke or the process was killed is kept, and the next call goes on there. The
    file is taken into the cache only when its size and digest are those that the hub names. Raises ToolError.
    """
    huggingface_hub = _client()
    huggingface_hub.utils.logging.set_verbosity_error()  # its own words would stand between our two lines
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
        # The client makes the links of its cache itself; it finds the bytes there and loads nothing.
        path = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
        if not _same_file(path, blob, metadata):
            raise ToolError(f"{repository} changed while {name} was fetched", "run the same command again")
        return path


def _same_file(path: Path, blob: Path, metadata: HfFileMetadata) -> bool:
    """Return True if the client's `path` holds the bytes of `blob`: as a link to it, or as a copy in a cache without.

    Where the cache's disk has no links (exFAT, SMB), each file of a commit is a copy, and the blob is not kept beside
    it: the client itself moves it there, and twice the bytes would not fit some disks.
    """
    if path.is_symlink():
        return path.resolve() == blob.resolve()
    copied = path.stat().st_size == metadata.size and commit_of(path) == metadata.commit_hash
    if copied:
        blob.unlink(missing_ok=True)
    return copied


def _blob(repository: str, name: str, metadata: HfFileMetadata) -> Path:
    """Return the cache's file of these bytes, named by their digest."""
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
    """Read the rest of a file, check it, and give it its name in the cache."""
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
        headers.pop("authorization", None)  # the address is signed, and the storage is not to see the user's token
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
        size_is_wrong = isinstance(error, OSError) and error.errno is None  # how the client says so
        if not is_transport(error) and not size_is_wrong:
            raise
        if partial.stat().st_size > size:
            partial.unlink()
            raise _spoilt(name, "more bytes than") from None
        kept = format_bytes(partial.stat().st_size)
        raise ToolError(
            f"the connection broke while {name} was fetched; {kept} of {format_bytes(size)} are kept",
            "run the same command again: it goes on from there",
        ) from None
    digest = _digest(partial, metadata.etag)
    if digest != metadata.etag:
        partial.unlink()
        raise _spoilt(name, f"digest {digest[:12]}, not the {metadata.etag[:12]} that")
    os.replace(partial, blob)


def _spoilt(name: str, how: str) -> ToolError:
    return ToolError(
        f"{name} arrived with {how} the hub says it has",
        "it was thrown away; run the same command again, and without a proxy if it happens twice",
    )


def _digest(path: Path, like: str) -> str:
    """Return the file's digest of the kind of `like`."""
    digest = hashlib.sha256() if len(like) == _SHA256 else hashlib.sha1(usedforsecurity=False)
    if len(like) == _GIT:
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _told(repository: str, name: str, revision: str) -> Iterator[None]:
    """Raise the client's many errors as ToolErrors."""
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
    """Return True for an error of the connection: the client passes those of its transport on as they are."""
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
    """Return the answer to a repository that the hub does not show, or does not show to this user."""
    return ToolError(
        f"the hub does not give {repository} to you",
        f"accept its licence at https://huggingface.co/{repository}, then run: hf auth login",
    )


def unreachable(repository: str, name: str, off: str | None = None, connection: str = "") -> ToolError:
    """Return the ToolError for a file that is not here while the hub cannot, or must not (`off` says why), be asked.

    `connection` is what the transport said.
    """
    why = f"the hub is switched off ({off})" if off else f"the hub cannot be reached{tried(connection)}"
    return ToolError(
        f"{repository}/{name} is not in the cache and {why}",
        "connect to the network once, or give `onnx_root=ROOT` with your own files",
    )
