"""Conditions for loading an engine, and its limits in the user's terms; checked without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError

# From the first supported release, to below the first with a possibly different API.
SUPPORTED = {"tensorrt": ((10, 15), (12, 0)), "tensorrt_rtx": ((1, 0), (2, 0))}
_SPECS = {spec.name: spec for contract in shapes.CONTRACTS.values() for spec in contract.inputs}
Extents = tuple[int, ...]


def require_version(backend: str, version: str) -> None:
    """Raise ToolError for an unsupported release of TensorRT."""
    least, end = SUPPORTED[backend]
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if not least <= numbers < end:
        wanted = f"{'.'.join(map(str, least))} or later, under {end[0]}"
        raise ToolError(f"{backend} {version} is not served: {wanted} is", "install the release of requirements.txt")


def require_ours(
    path: Path, backend: str, version: str, arch: str, rebuild: str, onnx: Path | None = None
) -> manifest.Manifest:
    """Return the manifest of an engine of this project for this release and GPU.

    `onnx` is the graph in use (None: unknown); an engine of another graph is refused. Digests are read from the
    manifests, which avoids hashing gigabytes. `rebuild` is the command in messages. Raises ToolError.
    """
    again = f"build it again: {rebuild}"
    if not path.is_file():
        raise ToolError(f"no engine {path}", f"build it: {rebuild}")
    reason = manifest.verify_manifest(path)
    record = manifest.read_manifest(path)
    if reason is not None or record is None:
        raise ToolError(f"{path} is not a finished engine of this project: {reason}", again)
    for setting, here in (("backend", backend), ("backend_version", version), ("arch", arch)):
        if record.settings.get(setting) != here:
            built = " ".join(str(record.settings.get(name)) for name in ("backend", "backend_version", "arch"))
            raise ToolError(f"{path} was built for {built}; this machine has {backend} {version} {arch}", again)
    source = manifest.read_manifest(onnx) if onnx is not None else None
    if onnx is not None and source is not None:
        for name, file in source.files.items():
            if name in record.inputs and record.inputs[name] != file.sha256:
                raise ToolError(f"{path} was built from another {name} than the one in {onnx.parent}", again)
    return record


def require_inside(
    path: Path, name: str, shape: Extents, limits: tuple[Extents, Extents], rebuild: str
) -> None:  # fmt: skip
    """Refuse an input shape outside an engine's optimization profile, in seconds, rows or frames. Raises ToolError."""
    least, largest = limits
    if len(shape) != len(least):
        raise ToolError(f"{path}: {name} has {len(least)} axes, not {len(shape)}", f"build it again: {rebuild}")
    dims = _SPECS[name].dims if name in _SPECS else ()
    for axis, (low, size, high) in enumerate(zip(least, shape, largest, strict=True)):
        if low <= size <= high:
            continue
        dim = dims[axis] if axis < len(dims) else None
        if dim == "B":
            raise ToolError(
                f"{path} takes {low} to {high} rows per forward, not {size}",
                f"choose a smaller `batch` or `depth` (a guided row is two), or build it again: {rebuild}",
            )
        if dim in ("L", "N"):
            unit = 1 if dim == "L" else shapes.SAMPLES_PER_FRAME
            raise ToolError(
                f"{path} takes {_frames(low, unit)} to {_frames(high, unit)}, not {_frames(size, unit)}",
                f"choose other `seconds` or `chunk_frames`, or build it again: {rebuild}",
            )
        raise ToolError(
            f"{path} takes {name} of shape {list(largest)}, not {list(shape)}", f"build it again: {rebuild}"
        )


def _frames(size: int, unit: int) -> str:
    frames = size // unit
    return f"{frames} latent frames ({frames * shapes.SAMPLES_PER_FRAME / shapes.SAMPLE_RATE:.1f} s)"
