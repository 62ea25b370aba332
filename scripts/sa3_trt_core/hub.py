"""Finding ONNX files and the tokenizer: in a local folder when one is given, else on the hub, through its own cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolError
from sa3_trt_core.protobuf import external_data_names
from sa3_trt_core.targets import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_TOKENIZER_FOLDER,
    HUB_FOLDER,
    HUB_REPOSITORY,
    TOKENIZER_FILES,
    Target,
)

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["external_data_names", "local_onnx", "local_tokenizer", "resolve_onnx", "resolve_tokenizer"]

_FORBIDDEN = (401, 403)
_NO_REPOSITORY = 404  # what the hub also says of a private one to somebody who is not logged in


def local_onnx(root: Path, target: Target) -> Path | None:
    """The target's ONNX under a local root, or None; names in order. Raises ToolError if a sidecar is missing."""
    for name in target.onnx:
        path = root / name
        if path.is_file():
            for sidecar in external_data_names(path):
                if not (path.parent / sidecar).is_file():
                    raise ToolError(
                        f"{path} needs {sidecar} beside it, which is missing",
                        f"copy it there, or make both again: {target.produced_by}",
                    )
            return path
    return None


def resolve_onnx(target: Target, onnx_root: Path | None, offline: bool = False) -> Path:
    """The target's ONNX file with its sidecars beside it.

    A given `onnx_root` is the only place looked at: silently taking the hub's file instead would run another model.
    Otherwise the hub (or its cache alone when `offline` or HF_HUB_OFFLINE is set). Raises ToolError.
    """
    if onnx_root is not None:
        path = local_onnx(onnx_root, target)
        if path is None:
            raise ToolError(f"no {' or '.join(target.onnx)} under {onnx_root}", f"make it: {target.produced_by}")
        return path
    for name in target.onnx:
        path = _fetch(HUB_REPOSITORY, f"{HUB_FOLDER}/{name}", offline)
        if path is not None:
            for sidecar in external_data_names(path):
                folder = name.rpartition("/")[0]
                if _fetch(HUB_REPOSITORY, f"{HUB_FOLDER}/{folder}/{sidecar}", offline) is None:
                    raise ToolError(
                        f"{sidecar} of {target.name} is not published, only the graph that needs it",
                        f"make both: {target.produced_by}; then give --onnx-root ROOT",
                    )
            return path
    raise ToolError(
        f"{target.onnx[0]} is not published yet in {HUB_REPOSITORY}",
        f"make it: {target.produced_by}; then give --onnx-root ROOT",
    )


def local_tokenizer(root: Path) -> Path | None:
    """tokenizer.json under a local root, or None unless its config is there too."""
    files = [root / name for name in TOKENIZER_FILES]
    return files[0] if all(file.is_file() for file in files) else None


def resolve_tokenizer(onnx_root: Path | None, offline: bool = False) -> Path:
    """tokenizer.json, its config beside it: from the root if given, else from the checkpoint's hub repository."""
    if onnx_root is not None:
        path = local_tokenizer(onnx_root)
        if path is None:
            raise ToolError(
                f"no {' and '.join(TOKENIZER_FILES)} under {onnx_root}",
                "make them: python build/export_onnx.py --model-dir DIR --onnx-root ROOT",
            )
        return path
    found = []
    for name in TOKENIZER_FILES:
        file = f"{CHECKPOINT_TOKENIZER_FOLDER}/{name.rpartition('/')[2]}"
        path = _fetch(CHECKPOINT_REPOSITORY, file, offline)
        if path is None:
            raise ToolError(f"{CHECKPOINT_REPOSITORY} has no {file}", "give --onnx-root ROOT with t5gemma/ in it")
        found.append(path)
    return found[0]


def _fetch(repository: str, name: str, offline: bool) -> Path | None:
    """One file of a hub repository, from the cache or downloaded; None if the repository has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, local_files_only=offline))
    except errors.LocalEntryNotFoundError as error:
        # Not in the cache, and the hub was not asked or its answer was no use: the answer, if any, is the cause.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(error.__cause__, repository, name) from None
        raise _unreachable(repository, name, offline) from None
    except errors.GatedRepoError:
        raise _gated(repository) from None
    except errors.EntryNotFoundError:
        return None
    except errors.HfHubHTTPError as error:
        raise _refused(error, repository, name) from None
    except (ConnectionError, TimeoutError):
        raise _unreachable(repository, name, offline) from None
    except OSError as error:
        raise ToolError(f"cannot store {name}: {error.strerror or error}", "free disk space or set HF_HOME") from None
    except Exception as error:
        if type(error).__module__.startswith("httpx"):  # the client's own transport errors, whichever release it uses
            raise _unreachable(repository, name, offline) from None
        raise


def _refused(error: HfHubHTTPError, repository: str, name: str) -> ToolError:
    status = error.response.status_code
    if status in _FORBIDDEN or status == _NO_REPOSITORY:
        return _gated(repository)
    return ToolError(f"the hub answered {status} for {repository}/{name}", "try again later")


def _gated(repository: str) -> ToolError:
    return ToolError(
        f"the hub does not give {repository} to you",
        f"accept its licence at https://huggingface.co/{repository}, then run: hf auth login",
    )


def _unreachable(repository: str, name: str, offline: bool) -> ToolError:
    off = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "the hub is switched off (HF_HUB_OFFLINE)" if off else "the hub cannot be reached"
    return ToolError(
        f"{repository}/{name} is not in the cache and {why}",
        "connect to the network once, or give --onnx-root ROOT with your own files",
    )
