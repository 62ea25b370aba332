"""A small read-only walker of ONNX files: which sidecar files they name, without importing onnx."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sa3_trt_core.errors import ToolError

DEEPEST = 64  # nested subgraphs; real graphs have 1 or 2
LONGEST_LOCATION = 4096
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
IR_VERSION, GRAPH = 1, 7  # of ModelProto: without both it is no model
EXTERNAL_DATA, DATA_LOCATION, EXTERNAL = 13, 14, 1  # of TensorProto
_DRIVE = re.compile(r"^[A-Za-z]:")
_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/[0-9a-f]{40}/")

# Message -> field number -> message inside it (onnx.proto). Fields that hold no tensor are skipped unread.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
Buffer = mmap.mmap | bytes


class _Malformed(Exception):
    """The bytes are not the protobuf message that they should be."""


def unfinished_marker(onnx_path: Path) -> Path:
    """What stands beside a graph while it and its sidecar are replaced by new ones."""
    return onnx_path.with_name(f".{onnx_path.name}.unfinished")


def external_data_names(onnx_path: Path) -> list[str]:
    """The distinct sidecar files that the tensors of an ONNX file name, in order, relative to its folder.

    The file is mapped, and weights inside it are skipped unread. Raises ToolError if it is missing, is not an ONNX
    protobuf, or names a sidecar that is absolute, empty or outside the file's folder: such a path would read any file
    of the machine into a model.
    """
    if unfinished_marker(onnx_path).exists():
        raise ToolError(
            f"{onnx_path} was being replaced when that run was killed, so its weights may be another's",
            "run the command that makes it again",
        )
    try:
        with onnx_path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise _Malformed("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                names = _model_locations(data)
    except OSError as error:
        raise ToolError(f"cannot read {onnx_path}: {error.strerror or error}", "name an existing .onnx file") from None
    except _Malformed as error:
        raise ToolError(f"{onnx_path} is not an ONNX file: {error}", "download or make it again") from None
    for name in names:
        _require_inside(name, onnx_path)
    return names


def _model_locations(data: Buffer) -> list[str]:
    fields = {(number, kind) for number, kind, _, _ in _fields(data, 0, len(data))}
    if (IR_VERSION, VARINT) not in fields or (GRAPH, BYTES) not in fields:
        raise _Malformed("it has no graph")
    names: dict[str, None] = {}
    pending = [("model", 0, len(data), 0)]
    while pending:
        message, start, end, depth = pending.pop()
        if depth > DEEPEST:
            raise _Malformed("its subgraphs are nested too deep")
        if message == "tensor":
            location = _tensor_location(data, start, end)
            if location is not None:
                names[location] = None
            continue
        children = _CHILDREN[message]
        found = [
            (children[number], at, at + size, depth + 1)
            for number, kind, at, size in _fields(data, start, end)
            if number in children and kind == BYTES
        ]
        pending.extend(reversed(found))
    return list(names)


def _tensor_location(data: Buffer, start: int, end: int) -> str | None:
    """The sidecar of one TensorProto, None if its data is inside, "" if it is outside but nowhere."""
    external = False
    location = ""
    for number, kind, at, size in _fields(data, start, end):
        if number == DATA_LOCATION and kind == VARINT:
            external = size == EXTERNAL
        elif number == EXTERNAL_DATA and kind == BYTES:
            entry = {key: (where, length) for key, what, where, length in _fields(data, at, at + size) if what == BYTES}
            if 1 in entry and _text(data, *entry[1]) == "location":
                location = _text(data, *entry.get(2, (0, 0)))
    return location if external else None


def _fields(data: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, size) of the fields of a message; a varint's value stands in place of its size."""
    while position < end:
        key, position = _varint(data, position, end)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _Malformed("it is not a protobuf message")
        if kind == VARINT:
            size, after = _varint(data, position, end)
        elif kind == BYTES:
            size, position = _varint(data, position, end)
            after = position + size
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
            after = position + size
        else:
            raise _Malformed("it is not a protobuf message")
        if after > end:
            raise _Malformed("it ends too early")
        yield number, kind, position, size
        position = after


def _varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise _Malformed("it ends too early")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _Malformed("it is not a protobuf message")


def _text(data: Buffer, start: int, size: int) -> str:
    if size > LONGEST_LOCATION:
        raise _Malformed("it names a sidecar with an overlong name")
    try:
        return bytes(data[start : start + size]).decode("utf-8")
    except UnicodeDecodeError:
        raise _Malformed("it names a sidecar in no known encoding") from None


def _require_inside(name: str, onnx_path: Path) -> None:
    parts = PurePosixPath(name).parts
    absolute = name.startswith(("/", "\\")) or _DRIVE.match(name) is not None
    outside = absolute or not parts or ".." in parts or "\\" in name or "\0" in name
    if outside or _leads_away(onnx_path.parent / name, onnx_path):
        raise ToolError(
            f"{onnx_path} keeps weights in {name!r}, which is not a file in its own folder",
            "do not use this file; get it from its publisher again",
        )


def _leads_away(sidecar: Path, onnx_path: Path) -> bool:
    """Whether a symbolic link takes a sidecar out of the folder of its graph.

    The hub's cache is made of such links: there the graph's own leads to the same place, or the path says so.
    """
    try:
        homes, found = (onnx_path.parent.resolve(), onnx_path.resolve().parent), sidecar.resolve()
    except (OSError, RuntimeError):  # a ring of links
        return True
    cached = _SNAPSHOT.search(onnx_path.as_posix()) is not None
    return not cached and not any(found.is_relative_to(home) for home in homes)
