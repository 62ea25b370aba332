"""Read the sidecar references of an ONNX file from its protobuf bytes, without importing onnx."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sa3_trt_core.errors import ToolError

MAX_DEPTH = 64  # nested subgraphs; real graphs have 1 or 2
MAX_LOCATION_LENGTH = 4096
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
IR_VERSION, GRAPH = 1, 7  # fields of ModelProto that every model has
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION, EXTERNAL = 9, 13, 14, 1  # fields of TensorProto
SMALL = 1024  # bytes; onnx.save keeps smaller tensors in the graph by default
_DRIVE = re.compile(r"^[A-Za-z]:")
_SNAPSHOT = re.compile(r"/models--[^/]+/snapshots/[0-9a-f]{40}/")

# Message -> field number -> nested message (onnx.proto). Fields without tensors are skipped.
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
    """Raised for bytes that are not the expected protobuf message."""


def unfinished_marker(onnx_path: Path) -> Path:
    """Return the path of the marker file beside a graph while the graph and its sidecar are being replaced."""
    return onnx_path.with_name(f".{onnx_path.name}.unfinished")


def external_data_names(onnx_path: Path) -> list[str]:
    """Return the distinct sidecar files of an ONNX file's tensors, in order, relative to its folder.

    The file is memory-mapped, and inline weights are skipped. Raises ToolError if it is missing, is not an ONNX
    protobuf, or names a sidecar path that is absolute, empty or outside the folder, which could read any file of the
    machine into a model.
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


def with_small_tensors(onnx_path: Path, model: bytes | None = None) -> bytes:
    """Return the bytes of an ONNX file with its external tensors below SMALL bytes inlined.

    Larger tensors stay in their sidecars. `model` replaces the graph of the file. ONNX Runtime needs shapes, axes and
    other small constants while it loads a graph, and does not read them from a sidecar. Raises ToolError as
    `external_data_names` does, and for a missing or truncated sidecar.
    """
    external_data_names(onnx_path)
    data = model or onnx_path.read_bytes()
    try:
        made = _rewritten("model", data, 0, len(data), onnx_path, 0)
    except _Malformed as error:
        raise ToolError(f"{onnx_path} is not an ONNX file: {error}", "download or make it again") from None
    return data if made is None else made


def _rewritten(message: str, data: bytes, start: int, end: int, onnx_path: Path, depth: int) -> bytes | None:
    """Return a message with its small external tensors inlined; None without such tensors."""
    if depth > MAX_DEPTH:
        raise _Malformed("its subgraphs are nested too deep")
    if message == "tensor":
        return _tensor_inside(data, start, end, onnx_path)
    children, parts, copied = _CHILDREN[message], [], start
    for number, kind, at, size, first in _spans(data, start, end):
        if number not in children or kind != BYTES:
            continue
        made = _rewritten(children[number], data, at, at + size, onnx_path, depth + 1)
        if made is not None:
            parts += [data[copied:first], _bytes_field(number, made)]
            copied = at + size
    return b"".join([*parts, data[copied:end]]) if parts else None


def _tensor_inside(data: bytes, start: int, end: int, onnx_path: Path) -> bytes | None:
    """Return an external TensorProto below SMALL bytes with its data inlined; None for any other."""
    entries = _tensor_entries(data, start, end)
    if entries is None:
        return None
    path = onnx_path.parent / entries.get("location", "")
    try:
        offset, whole = int(entries.get("offset", 0)), path.stat().st_size
        length = int(entries["length"]) if "length" in entries else whole - offset
        if length >= SMALL:
            return None
        if min(offset, length) < 0 or offset + length > whole:
            raise _Malformed(f"{path.name} is shorter than its tensors")
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read(length)
    except ValueError:
        raise _Malformed("a tensor's offset or length in its sidecar is not a number") from None
    except OSError as error:
        raise ToolError(f"cannot read {path}: {error.strerror or error}", "get or make both files again") from None
    kept, copied = [], start
    for number, _, at, size, first in _spans(data, start, end):
        if number in (EXTERNAL_DATA, DATA_LOCATION):
            kept.append(data[copied:first])
            copied = at + size if number == EXTERNAL_DATA else _varint(data, at, end)[1]
    return b"".join([*kept, data[copied:end], _bytes_field(RAW_DATA, raw)])


def _bytes_field(number: int, content: bytes) -> bytes:
    """Encode a length-delimited field."""
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    """Encode a varint."""
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def _model_locations(data: Buffer) -> list[str]:
    fields = {(number, kind) for number, kind, _, _ in _fields(data, 0, len(data))}
    if (IR_VERSION, VARINT) not in fields or (GRAPH, BYTES) not in fields:
        raise _Malformed("it has no graph")
    names: dict[str, None] = {}
    pending = [("model", 0, len(data), 0)]
    while pending:
        message, start, end, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise _Malformed("its subgraphs are nested too deep")
        if message == "tensor":
            location = _tensor_location(data, start, end)
            if location is not None:
                names[location] = None
            continue
        children = _CHILDREN[message]
        nested = [
            (children[number], at, at + size, depth + 1)
            for number, kind, at, size in _fields(data, start, end)
            if number in children and kind == BYTES
        ]
        pending.extend(reversed(nested))
    return list(names)


def _tensor_location(data: Buffer, start: int, end: int) -> str | None:
    """Return the sidecar of a TensorProto; None for inline data, "" for external data without a location."""
    entries = _tensor_entries(data, start, end)
    return None if entries is None else entries.get("location", "")


def _tensor_entries(data: Buffer, start: int, end: int) -> dict[str, str] | None:
    """Return the location, offset and length entries of a TensorProto; None for inline data."""
    external = False
    entries: dict[str, str] = {}
    for number, kind, at, size in _fields(data, start, end):
        if number == DATA_LOCATION and kind == VARINT:
            external = size == EXTERNAL
        elif number == EXTERNAL_DATA and kind == BYTES:
            entry = {key: (where, length) for key, what, where, length in _fields(data, at, at + size) if what == BYTES}
            if 1 in entry:
                entries[_text(data, *entry[1])] = _text(data, *entry.get(2, (0, 0)))
    return entries if external else None


def _fields(data: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, wire type, start, size) of the fields of a message; for a varint, size is its value."""
    return ((number, kind, at, size) for number, kind, at, size, _ in _spans(data, position, end))


def _spans(data: Buffer, position: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield what `_fields` yields and the position of the field's key."""
    while position < end:
        first = position
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
        yield number, kind, position, size, first
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
    if size > MAX_LOCATION_LENGTH:
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
    """Return True if a symbolic link leads from a sidecar out of the folder of its graph.

    The hub's cache consists of such links, and is allowed: there the graph's link leads to the same folder.
    """
    try:
        homes, target = (onnx_path.parent.resolve(), onnx_path.resolve().parent), sidecar.resolve()
    except (OSError, RuntimeError):  # a cycle of links
        return True
    cached = _SNAPSHOT.search(onnx_path.as_posix()) is not None
    return not cached and not any(target.is_relative_to(home) for home in homes)
