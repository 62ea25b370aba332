"""Manifest beside an artefact: digests of files and inputs, settings and tools. Written last, it marks completeness."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sa3_trt_core.artifacts.files import sha256_of, write_atomic_text
from sa3_trt_core.errors import ToolError

MANIFEST_SUFFIX = ".manifest.json"
FORMAT = 1
MAX_BYTES = 4 << 20  # bytes; a manifest has a few kB
IDENTITY_LETTERS = 16  # letters of a SHA-256
TOOLS = ("torch", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "nvidia-modelopt", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class FileRecord:
    """One file of an artefact: its digest and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Manifest of one artefact. `files` are names in the manifest's folder; `created` is UTC."""

    kind: str
    files: dict[str, FileRecord]
    inputs: dict[str, str]
    tools: dict[str, str]
    settings: dict[str, Any]
    gates: dict[str, Any] = field(default_factory=dict)
    created: str = ""


def manifest_path(artefact: Path) -> Path:
    """Return the path of an artefact's manifest: beside it, with its whole name."""
    return artefact.with_name(artefact.name + MANIFEST_SUFFIX)


def write_manifest(  # the order is the API
    artefact: Path,
    kind: str,
    files: Sequence[Path],
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    gates: Mapping[str, Any] | None = None,
    tools: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the manifest of a finished artefact, as the last step of its build; return it.

    `files` are in the artefact's folder; `inputs` are name -> sha256. `tools` are versions (default: those installed).
    """
    folder = artefact.parent.resolve()
    outside = [file for file in files if file.parent.resolve() != folder]
    if outside:
        raise ValueError(f"{outside[0]} is not in the folder of {artefact}")
    manifest = Manifest(
        kind=kind,
        files={file.name: FileRecord(sha256_of(file), file.stat().st_size) for file in files},
        inputs=dict(inputs),
        tools=dict(tool_versions(TOOLS) if tools is None else tools),
        settings=_plain(settings),
        gates=_plain(gates or {}),
        created=_now(),
    )
    document = {"format": FORMAT, **asdict(manifest)}
    write_atomic_text(manifest_path(artefact), json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return manifest


def read_manifest(artefact: Path) -> Manifest | None:
    """Return the manifest of an artefact, None without one. Raises ToolError for a file of another format."""
    path = manifest_path(artefact)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from None
    if len(text) > MAX_BYTES:
        raise _broken(path, f"larger than {MAX_BYTES} bytes")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise _broken(path, "not valid JSON") from None
    return _parse(document, path)


def verify_manifest(artefact: Path, deep: bool = False) -> str | None:
    """Return why an artefact is incomplete or changed, or None; `deep` hashes every byte again."""
    manifest = read_manifest(artefact)
    if manifest is None:
        return f"{manifest_path(artefact).name} is missing"
    if artefact.name not in manifest.files:
        return f"its manifest does not list {artefact.name}"
    for name, record in manifest.files.items():
        file = artefact.parent / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != record.bytes:
            return f"{name} has {size} bytes, its manifest says {record.bytes}"
        if deep and sha256_of(file) != record.sha256:
            return f"{name} is not the file that its manifest describes"
    return None


def identity(artefact: Path) -> str | None:
    """Return a short content ID of an artefact, from the digests in its manifest; None without a manifest."""
    manifest = read_manifest(artefact)
    if manifest is None:
        return None
    digests = json.dumps(sorted((name, record.sha256) for name, record in manifest.files.items()))
    return hashlib.sha256(digests.encode()).hexdigest()[:IDENTITY_LETTERS]


def is_current(artefact: Path, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[bool, str]:
    """Return (True, "current") for a complete artefact of these inputs and settings, else (False, reason)."""
    try:
        reason = verify_manifest(artefact)
        manifest = read_manifest(artefact)
    except ToolError as error:
        return False, error.message
    if reason is not None or manifest is None:
        return False, reason or "its manifest is missing"
    pairs = (("input", dict(inputs), manifest.inputs), ("setting", _plain(settings), manifest.settings))
    for name, wanted, recorded in pairs:
        for key in sorted(wanted.keys() | recorded.keys()):
            if key not in wanted or key not in recorded or wanted[key] != recorded[key]:
                return False, f"{name} {key} has changed"
    return True, "current"


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed distributions among `names`."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _parse(document: Any, path: Path) -> Manifest:
    groups = ("files", "inputs", "tools", "settings", "gates")
    fields = {"kind": str, "created": str, **dict.fromkeys(groups, dict)}
    if not isinstance(document, dict):
        raise _broken(path, "not a JSON object")
    if document.get("format") != FORMAT:
        raise _broken(path, f"format {document.get('format')!r}, this program reads {FORMAT}")
    for name, kind in fields.items():
        if not isinstance(document.get(name), kind):
            raise _broken(path, f"{name!r} is missing or of the wrong type")
    files = {}
    for name, record in document["files"].items():
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise _broken(path, f"file name {name!r} leaves its folder")
        known = isinstance(record, dict) and isinstance(record.get("sha256"), str)
        if not known or type(record.get("bytes")) is not int:
            raise _broken(path, f"the record of {name!r} is malformed")
        files[name] = FileRecord(record["sha256"], record["bytes"])
    for group in ("inputs", "tools"):
        if not all(isinstance(value, str) for value in document[group].values()):
            raise _broken(path, f"{group!r} has a value that is not text")
    return Manifest(files=files, **{name: document[name] for name in fields if name != "files"})


def _broken(path: Path, why: str) -> ToolError:
    return ToolError(f"{path} is not a manifest: {why}", "delete it and make the artefact again")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping after a JSON round trip, for comparison with stored ones (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=_scalar, allow_nan=False))
    return plain


def _scalar(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch values, without importing either
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be stored in a manifest")


def _now() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.datetime.now(datetime.UTC)
    if epoch.isdigit():
        moment = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
