"""What leaves this machine for the hub: checked against report and manifest, uploaded, read back."""

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
LARGEST_REPORT = 64 << 20  # bytes


@dataclass(frozen=True)
class Sent:
    """What the hub made of an upload."""

    commit: str
    address: str
    read_back: int


@dataclass(frozen=True)
class Item:
    """One file: its path in the repository, and where its bytes are (a file of ours, or in memory)."""

    path: str
    source: Path | bytes
    sha256: str
    bytes: int

    @property
    def by_name(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": self.path, "sha256": self.sha256, "bytes": self.bytes}

    def is_named(self, digest: str | None) -> bool:
        """Whether the hub's digest is this file's: SHA-256 of a large file, git's SHA-1 of a small one."""
        if digest is None or len(digest) == len(self.sha256):
            return digest == self.sha256
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return digest == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Parcel:
    """Everything that is uploaded, and the gates that it has passed."""

    files: tuple[Item, ...]
    gates: dict[str, Any] = field(default_factory=dict)


def check(onnx: Path) -> Parcel:
    """Return the parcel of a finished FP8 DiT, every byte of it compared with its manifest.

    Raises ToolError for a file that is not one, is torn, or has another name than the published; GateError for one
    whose own gates do not hold, or that was made to compare with and not to use.
    """
    target = targets.publishable_at(onnx)
    published, again = target.onnx[0], f"make it: {target.produced_by}"
    if not onnx.is_file():
        raise ToolError(f"no such file: {onnx}", again)
    if onnx.name != Path(published).name:
        raise ToolError(f"{onnx.name} is published as {Path(published).name} only", "build it under that name")
    reason = manifest.verify_manifest(onnx, deep=True)
    record = manifest.read_manifest(onnx)
    if reason is not None or record is None:
        raise ToolError(f"{onnx} is not a finished artefact: {reason}", again)
    if record.kind != KIND:
        raise ToolError(f"{onnx} is a {record.kind}, not a {KIND}", again)
    sidecars, wanted = resolve.external_data_names(onnx), f"{onnx.name}.data"
    if sidecars != [wanted] or wanted not in record.files:
        raise ToolError(f"{onnx} keeps its weights in {', '.join(sidecars) or 'itself'}, not in {wanted}", again)
    if check_path(onnx).name not in record.files:
        raise ToolError(f"{onnx} has no check rows, which engines are held to", "build it again: they go with it")
    report = _report(onnx, record)
    _require_gates(onnx, record)
    folder = f"{targets.HUB_FOLDER}/{Path(published).parent}"
    items = [
        Item(f"{folder}/{name}", onnx.parent / name, record.files[name].sha256, record.files[name].bytes)
        for name in (onnx.name, wanted, onnx.name + REPORT_SUFFIX, check_path(onnx).name)
    ]
    inputs = {name: digest for name, digest in record.inputs.items() if name.endswith(".npz")}
    summary = {"calibration": report["calibration"], "calibration_sets": inputs, "settings": record.settings}
    data = (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode()
    items.append(Item(f"{folder}/{CALIBRATION}", data, hashlib.sha256(data).hexdigest(), len(data)))
    return Parcel(tuple(items), dict(record.gates))


def send(parcel: Parcel, repository: str, branch: str | None, message: str) -> Sent:
    """Upload a parcel to a branch, or as a pull request, and ask the hub for what it has then.

    Raises ToolError; GateError when the hub has something else than what was sent.
    """
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi

    huggingface_hub.utils.logging.set_verbosity_error()
    api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
    with _told(repository):
        api.whoami()
        if branch is not None and branch != targets.HUB_REVISION:
            api.create_branch(repository, branch=branch, exist_ok=True)
        info = api.create_commit(
            repository,
            [CommitOperationAdd(item.path, item.source) for item in parcel.files],
            commit_message=message,
            revision=branch or targets.HUB_REVISION,
            create_pr=branch is None,
        )
        _read_back(api, parcel, repository, info.oid)
    return Sent(info.oid, info.pr_url or info.commit_url, len(parcel.files))


def _report(onnx: Path, record: manifest.Manifest) -> dict[str, Any]:
    path = onnx.with_name(onnx.name + REPORT_SUFFIX)
    if path.name not in record.files:
        raise ToolError(f"the manifest of {onnx} does not list {path.name}", "build it again: the report goes with it")
    report: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        report = json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST_REPORT else None
    wanted = ("calibration", "outputs")
    if not isinstance(report, dict) or not all(isinstance(report.get(key), dict) for key in wanted):
        raise ToolError(f"{path} is not the report of an FP8 build", "build it again")
    for name, digest in report["outputs"].items():
        if name in record.files and record.files[name].sha256 != digest:
            raise ToolError(f"{path} is the report of another {name}", "build it again")
    return report


def _require_gates(onnx: Path, record: manifest.Manifest) -> None:
    earlier = record.gates.get("worst denoised cosine")  # the key of manifests before report format 2
    worst = record.gates.get("worst_denoised_cosine", earlier)
    least = record.settings.get("min_cosine")
    if record.gates.get("proof") != "holds":
        raise GateError(f"{onnx} is not proved: {record.gates.get('proof')}", "build it again and see its report")
    if not isinstance(worst, int | float) or not isinstance(least, int | float) or not worst >= least:
        raise GateError(f"{onnx}: worst denoised cosine {worst}, wanted {least}", "build it again and see its report")
    if record.settings.get("recipe") == "reference":
        raise GateError(f"{onnx} is made by --recipe reference, to compare with", "build it without --recipe reference")


def _read_back(api: HfApi, parcel: Parcel, repository: str, commit: str) -> None:
    """Ask for size and digest of every file of the new commit, and for the bytes of the small ones."""
    import huggingface_hub
    from huggingface_hub import constants

    for item in parcel.files:
        url = huggingface_hub.hf_hub_url(repository, item.path, revision=commit, endpoint=api.endpoint)
        found = huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        if found.size != item.bytes or not item.is_named(found.etag):
            raise GateError(
                f"{repository} has {found.size} bytes of {item.path} with digest {found.etag}, sent were {item.bytes}",
                f"close the pull request or revert {commit[:8]}, and send again",
            )
        if item.path.endswith(".onnx"):
            path = download.fetch(repository, item.path, commit)
            if path is None or files.sha256_of(path) != item.sha256:
                raise GateError(f"{item.path} comes back with other bytes", f"revert {commit[:8]}, and send again")


@contextlib.contextmanager
def _told(repository: str) -> Iterator[None]:
    """The client's errors as ours; what the client says is not passed on, for it may quote a request's headers."""
    from huggingface_hub import errors

    login = "run: hf auth login, with a token that may write"
    try:
        yield
    except ToolError:
        raise
    except (errors.LocalTokenNotFoundError, errors.RepositoryNotFoundError, errors.GatedRepoError):
        raise ToolError(f"the hub does not let you write to {repository}", login) from None
    except errors.RevisionNotFoundError:
        raise ToolError(f"{repository} has no such branch", "name another --branch") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ToolError(f"the hub does not let you write to {repository}", login) from None
        raise ToolError(f"the hub answered {status}", "send again later: nothing is half there") from None
    except Exception as error:
        if download.is_transport(error) or isinstance(error, RuntimeError | ConnectionError | TimeoutError):
            raise ToolError(
                "the connection broke while sending", "send again: what has arrived is not sent twice"
            ) from None
        raise
