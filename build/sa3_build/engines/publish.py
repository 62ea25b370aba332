"""Validate and upload the FP8 DiT to the Hub, then read it back."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import targets
from sa3_trt_core.artifacts import files, manifest
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.hub import download, resolve

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KIND = "dit_fp8"
REPORT_SUFFIX, CALIBRATION = ".report.json", "dit_fp8.calibration.json"
MAX_REPORT_BYTES = 64 << 20  # bytes


@dataclass(frozen=True)
class UploadResult:
    """Result of an upload: commit, address and number of files read back."""

    commit: str
    address: str
    read_back: int


@dataclass(frozen=True)
class UploadFile:
    """One file: its path in the repository, and its content (a local file or bytes)."""

    path: str
    source: Path | bytes
    sha256: str
    bytes: int

    @property
    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"path": self.path, "sha256": self.sha256, "bytes": self.bytes}

    def is_named(self, digest: str | None) -> bool:
        """Return True if the hub's digest is this file's: SHA-256 of a large file, git's SHA-1 of a small one."""
        if digest is None or len(digest) == len(self.sha256):
            return digest == self.sha256
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return digest == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Upload:
    """The files to upload, and the gates that they passed."""

    files: tuple[UploadFile, ...]
    gates: dict[str, Any] = field(default_factory=dict)


def check(onnx: Path) -> Upload:
    """Return the files of a finished FP8 DiT to upload, each compared with its manifest.

    Raises ToolError for a file that is not an FP8 DiT, is incomplete, or does not have its published name; GateError if
    its gates do not hold, or if it was built for comparison only.
    """
    target = targets.publishable_at(onnx)
    published, hint = target.onnx[0], f"make it: {target.produced_by}"
    if not onnx.is_file():
        raise ToolError(f"no such file: {onnx}", hint)
    if onnx.name != Path(published).name:
        raise ToolError(
            f"{onnx.name} cannot be published: the name must be {Path(published).name}", "build it under that name"
        )
    reason = manifest.verify_manifest(onnx, deep=True)
    record = manifest.read_manifest(onnx)
    if reason is not None or record is None:
        raise ToolError(f"{onnx} is not a finished artefact: {reason}", hint)
    if record.kind != KIND:
        raise ToolError(f"{onnx} is a {record.kind}, not a {KIND}", hint)
    sidecars, sidecar = resolve.external_data_names(onnx), f"{onnx.name}.data"
    if sidecars != [sidecar] or sidecar not in record.files:
        raise ToolError(f"{onnx} keeps its weights in {', '.join(sidecars) or 'itself'}, not in {sidecar}", hint)
    if check_path(onnx).name not in record.files:
        raise ToolError(f"{onnx} has no check rows", "rebuild it: they are published with the graph")
    report = _report(onnx, record)
    _require_gates(onnx, record)
    folder = f"{targets.HUB_FOLDER}/{Path(published).parent}"
    items = [
        UploadFile(f"{folder}/{name}", onnx.parent / name, record.files[name].sha256, record.files[name].bytes)
        for name in (onnx.name, sidecar, onnx.name + REPORT_SUFFIX, check_path(onnx).name)
    ]
    inputs = {name: digest for name, digest in record.inputs.items() if name.endswith(".npz")}
    summary = {"calibration": report["calibration"], "calibration_sets": inputs, "settings": record.settings}
    data = (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode()
    items.append(UploadFile(f"{folder}/{CALIBRATION}", data, hashlib.sha256(data).hexdigest(), len(data)))
    return Upload(tuple(items), dict(record.gates))


def send(upload: Upload, repository: str, branch: str | None, message: str) -> UploadResult:
    """Upload the files to a branch or as a pull request, and verify the hub's copies.

    Raises ToolError; GateError when the hub's files differ from those sent.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi

    huggingface_hub.utils.logging.set_verbosity_error()
    api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
    with _hub_errors(repository):
        api.whoami()
        if branch is not None and branch != targets.HUB_REVISION:
            api.create_branch(repository, branch=branch, exist_ok=True)
        info = api.create_commit(
            repository,
            [CommitOperationAdd(item.path, item.source) for item in upload.files],
            commit_message=message,
            revision=branch or targets.HUB_REVISION,
            create_pr=branch is None,
        )
        _read_back(api, upload, repository, info.oid)
    return UploadResult(info.oid, info.pr_url or info.commit_url, len(upload.files))


def _report(onnx: Path, record: manifest.Manifest) -> dict[str, Any]:
    path = onnx.with_name(onnx.name + REPORT_SUFFIX)
    if path.name not in record.files:
        raise ToolError(
            f"the manifest of {onnx} does not list {path.name}", "rebuild it: the report is published with the graph"
        )
    report: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        report = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_REPORT_BYTES else None
    sections = ("calibration", "outputs")
    if not isinstance(report, dict) or not all(isinstance(report.get(key), dict) for key in sections):
        raise ToolError(f"{path} is not the report of an FP8 build", "rebuild it")
    for name, digest in report["outputs"].items():
        if name in record.files and record.files[name].sha256 != digest:
            raise ToolError(f"{path} belongs to another {name}", "rebuild it")
    return report


def _require_gates(onnx: Path, record: manifest.Manifest) -> None:
    earlier = record.gates.get("worst denoised cosine")  # the key of manifests before report format 2
    worst = record.gates.get("worst_denoised_cosine", earlier)
    limit = record.settings.get("min_cosine")
    if record.gates.get("proof") != "holds":
        raise GateError(f"{onnx} has no proof: {record.gates.get('proof')}", "rebuild it and see its report")
    if not isinstance(worst, int | float) or not isinstance(limit, int | float) or not worst >= limit:
        raise GateError(f"{onnx}: worst denoised cosine {worst} (required >= {limit})", "rebuild it and see its report")
    if record.settings.get("recipe") == "reference":
        raise GateError(
            f"{onnx} was built with --recipe reference, for comparison only",
            "rebuild it without --recipe reference",
        )


def _read_back(api: HfApi, upload: Upload, repository: str, commit: str) -> None:
    """Compare size and digest of every file of the new commit, and the bytes of the small ones."""
    import huggingface_hub
    from huggingface_hub import constants

    for item in upload.files:
        url = huggingface_hub.hf_hub_url(repository, item.path, revision=commit, endpoint=api.endpoint)
        metadata = huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if metadata.size != item.bytes or not item.is_named(metadata.etag):
            raise GateError(
                f"{repository} has {metadata.size} bytes of {item.path} (digest {metadata.etag}); sent: {item.bytes}",
                f"close the pull request or revert {commit[:8]}, and send again",
            )
        if item.path.endswith(".onnx"):
            path = download.fetch(repository, item.path, commit)
            if path is None or files.sha256_of(path) != item.sha256:
                raise GateError(f"{item.path} differs when read back", f"revert {commit[:8]}, and send again")


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Convert the hub client's errors to ToolError, without their text, which may quote request headers."""
    from huggingface_hub import errors

    login = "run hf auth login with a token that has write permission"
    try:
        yield
    except ToolError:
        raise
    except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError):
        raise ToolError(f"no write permission for {repository} on the hub", login) from None
    except errors.RevisionNotFoundError:
        raise ToolError(f"{repository} has no such branch", "choose another --branch") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ToolError(f"no write permission for {repository} on the hub", login) from None
        raise ToolError(f"the hub answered {status}", "try again later; the upload is atomic") from None
    except Exception as error:
        if download.is_transport(error) or isinstance(error, RuntimeError | ConnectionError | TimeoutError):
            raise ToolError(
                "connection lost during the upload", "run it again: files that were uploaded are skipped"
            ) from None
        raise
