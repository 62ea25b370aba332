"""Check rows: seeded inputs with the outputs of ONNX Runtime, to verify any engine built from a graph.

`X.onnx.check.npz` is beside a graph and is copied beside every engine built from it. Each row has the seed of the
inputs, the graph's output, and the change of the output under 1e-4 of noise on the inputs: the error of a correct
engine with other kernels is about as large, that of a wrong one larger.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".check.npz"
FORMAT = 1
MAX_BYTES = 4 << 20  # bytes, packed and unpacked
MAX_ROWS, MAX_BATCH = 64, 2
NUDGE = 1e-4  # relative to the deviation of the inputs
STRIDE = 17  # every 17th value of large outputs is stored; coprime to every width
DIGEST = re.compile("[0-9a-f]{64}")
PURPOSES = ("text", "inpaint", "noise levels", "durations", "tokens", "sound")
NOISE_LEVELS, DURATIONS = 2, 3  # probes: two rows whose difference is below fp16 resolution
PROBE_RATIO = 1.0 + 2.0**-20  # a change of an fp32 value below fp16 resolution
ROUNDED = (0.7455, 47.0)  # sigma and seconds of the probes; fp16 rounds a duration of 47 s the most
DTYPES: Mapping[str, type] = {
    "purpose": np.uint8, "seed": np.int64, "batch": np.int32, "frames": np.int32, "sigma": np.float32,
    "seconds": np.float32, "response": np.float64, "lengths": np.int64, "expected": np.float32,
}  # fmt: skip


@dataclass(frozen=True)
class CheckRow:
    """Description of the inputs of one run; all `batch` rows have the same `sigma` and `seconds`."""

    purpose: int
    seed: int
    batch: int
    frames: int
    sigma: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Name of the row in messages."""
        level = f", sigma {self.sigma[0]:.4g}" if self.sigma else ""
        return f"{PURPOSES[self.purpose]}{level}, {self.frames} frames x {self.batch}"


@dataclass(frozen=True)
class CheckSet:
    """Check rows of one graph. `expected` are the stored outputs, flat; `response` the L2 of their change under NUDGE.

    `kind` is a contract of shapes.CONTRACTS; `floor` the relative L2 that is always allowed; `graph` the sorted sha256
    of the graph and its sidecars.
    """

    kind: str
    floor: float
    graph: tuple[str, ...]
    rows: tuple[CheckRow, ...]
    expected: tuple[NDArray[np.float32], ...]
    response: tuple[float, ...]


def check_path(artefact: Path) -> Path:
    """Return the path of the check rows of a graph or an engine: beside it, with its whole name."""
    return artefact.with_name(artefact.name + SUFFIX)


def planned_rows(kind: str) -> tuple[CheckRow, ...]:
    """Return the rows of a contract; for a DiT text and in-painting, three sigmas, two lengths, B 1 and 2."""
    if kind == "dit":
        return (
            CheckRow(0, 1, 1, 24, (1.0,), (29.72,)),
            CheckRow(0, 2, 2, 70, (0.7455, 0.7455), (183.25, 5.0)),
            CheckRow(0, 3, 2, 24, (0.2739, 0.2739), (47.0, 120.0)),
            CheckRow(1, 4, 1, 70, (1.0,), (47.0,)),
            CheckRow(1, 5, 1, 24, (0.7455,), (29.72,)),
            CheckRow(1, 6, 2, 70, (0.2739, 0.2739), (30.0, 183.25)),
            CheckRow(NOISE_LEVELS, 7, 2, 24, _pair(ROUNDED[0]), (30.0, 30.0)),
            CheckRow(DURATIONS, 8, 2, 24, (ROUNDED[0],) * 2, _pair(ROUNDED[1])),
        )
    if kind == "t5gemma":
        return (CheckRow(4, 1, 1, 12), CheckRow(4, 2, 1, 90))  # frames: number of valid tokens
    return (CheckRow(5, 1, 1, shapes.MIN_CODEC_FRAMES), CheckRow(5, 2, 1, shapes.MIN_CODEC_FRAMES + 5))


def _pair(value: float) -> tuple[float, float]:
    near = float(np.float16(value / 384.0)) * 384.0 if value > 1.0 else float(np.float16(value))
    return near, near * PROBE_RATIO


def inputs_of(kind: str, row: CheckRow, nudged: bool = False) -> dict[str, Tensor]:
    """Return the inputs of a row, with noise NUDGE if `nudged`; equal on every machine (RandomState is stable)."""
    import torch

    random = np.random.RandomState(row.seed)
    noise = np.random.RandomState(1000 + row.seed)

    def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        drawn = random.standard_normal(shape)
        off = NUDGE * noise.standard_normal(shape) if nudged else 0.0
        return np.asarray(scale * (drawn + off), np.float32)

    made: dict[str, NDArray[Any]]
    if kind == "dit":
        made = _dit_inputs(row, normal)
    elif kind == "t5gemma":
        made = {
            "input_ids": random.randint(3, 250, (1, shapes.TEXT_TOKENS)).astype(np.int64),
            "attention_mask": (np.arange(shapes.TEXT_TOKENS) < row.frames)[None].astype(np.int64),
        }
    elif kind == "same-decoder":
        made = {"latent": normal(1, shapes.LATENT_CHANNELS, row.frames)}
    else:
        made = {"audio": normal(1, shapes.AUDIO_CHANNELS, row.frames * shapes.SAMPLES_PER_FRAME, scale=0.1)}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in made.items()}


def _dit_inputs(row: CheckRow, normal: Any) -> dict[str, NDArray[Any]]:
    probe = row.purpose in (NOISE_LEVELS, DURATIONS)
    drawn = 1 if probe else row.batch  # both rows of a probe differ only in the probed value
    keep = np.zeros((drawn, 1, row.frames), np.float32)
    keep[..., : row.frames // 3] = keep[..., 2 * row.frames // 3 :] = float(row.purpose == 1)
    used = np.arange(shapes.TEXT_TOKENS)[None] < np.asarray([12, 90][:drawn])[:, None]
    made = {
        "x": normal(drawn, shapes.LATENT_CHANNELS, row.frames),
        "t5_hidden": normal(drawn, shapes.TEXT_TOKENS, shapes.TEXT_CHANNELS, scale=0.3),
        "t5_mask": used.astype(np.float32),
        "local_add_cond": np.concatenate([keep, keep * normal(drawn, shapes.LATENT_CHANNELS, row.frames)], axis=1),
    }
    if probe:
        made = {name: np.repeat(value, row.batch, axis=0) for name, value in made.items()}
    return {**made, "t": np.asarray(row.sigma, np.float32), "seconds_total": np.asarray(row.seconds, np.float32)}


def stored_part(kind: str, row: CheckRow, outputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """Return the compared part of a graph's outputs, flat: a velocity whole, every 17th value of features and samples.

    Text features of padding are omitted: nothing reads them. Integer samples are scaled to [-1, 1]. Raises ToolError if
    the graph lacks the contract's output.
    """
    spec = shapes.CONTRACTS[kind].outputs[0]
    output = outputs.get(spec.name, outputs.get("audio"))
    if output is None:
        raise ToolError(f"the graph gives {', '.join(outputs)}, not {spec.name}", "use the graph of that target")
    values = output.detach().cpu().numpy()
    if kind == "t5gemma":
        values = values[:, : row.frames]
    if values.dtype.kind == "i":
        values = values / 32767.0
    flat = np.asarray(values, np.float32).ravel()
    return flat if kind == "dit" else np.ascontiguousarray(flat[::STRIDE])


def write(path: Path, checks: CheckSet) -> None:
    """Write check rows as a compressed .npz, atomically. Raises ValueError above MAX_BYTES."""
    padded = {name: np.full((len(checks.rows), MAX_BATCH), np.nan, np.float32) for name in ("sigma", "seconds")}
    for index, row in enumerate(checks.rows):
        for name, table in padded.items():
            values = getattr(row, name)
            table[index, : len(values)] = values
    arrays: dict[str, Any] = {
        "format": FORMAT, "kind": checks.kind, "floor": checks.floor, "graph": list(checks.graph),
        **{name: np.asarray([getattr(row, name) for row in checks.rows], DTYPES[name]) for name in
           ("purpose", "seed", "batch", "frames")},
        **padded,
        "response": np.asarray(checks.response, np.float64),
        "lengths": np.asarray([len(one) for one in checks.expected], np.int64),
        "expected": np.concatenate(checks.expected).astype(np.float32),
    }  # fmt: skip
    with files.atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
        if stream.tell() > MAX_BYTES:
            raise ValueError(f"check rows of {stream.tell()} bytes, more than {MAX_BYTES}")


def read(path: Path) -> CheckSet:
    """Read check rows from a file, without pickles. Raises ToolError that names the defect."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _broken(path, f"larger than {MAX_BYTES} bytes")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                raise _broken(path, f"unpacks to more than {MAX_BYTES} bytes")
        with np.load(path, allow_pickle=False) as archive:
            wanted = ("format", "kind", "floor", "graph", *DTYPES)
            missing = [name for name in wanted if name not in archive.files]
            if missing:
                raise _broken(path, f"it has no member {missing[0]!r}")
            arrays = {name: archive[name] for name in wanted}
    except OSError as error:
        raise _broken(path, error.strerror or "cannot be read") from None
    except Exception as error:  # zipfile, zlib and NumPy raise different errors for damaged bytes
        if isinstance(error, ToolError | MemoryError):
            raise
        raise _broken(path, "it is not an .npz file") from None
    return _parsed(path, arrays)


def _parsed(path: Path, arrays: Mapping[str, NDArray[Any]]) -> CheckSet:
    if arrays["format"].shape or int(arrays["format"]) != FORMAT:
        raise _broken(path, f"format {arrays['format']}, this program reads {FORMAT}")
    kind, count = str(arrays["kind"]), len(np.atleast_1d(arrays["seed"]))
    if kind not in shapes.CONTRACTS or not 0 < count <= MAX_ROWS:
        raise _broken(path, f"{count} rows of a {kind}")
    for name, dtype in DTYPES.items():
        wide = (count, MAX_BATCH) if name in ("sigma", "seconds") else (count,)
        if arrays[name].dtype != dtype or (name != "expected" and arrays[name].shape != wide):
            raise _broken(path, f"{name!r} is {arrays[name].dtype} {arrays[name].shape}")
    floor, lengths, expected = float(arrays["floor"]), arrays["lengths"], arrays["expected"]
    if not 0.0 < floor < 1.0 or expected.ndim != 1 or (lengths < 1).any() or int(lengths.sum()) != expected.size:
        raise _broken(path, "its sizes contradict each other")
    if not np.isfinite(expected).all() or not (np.isfinite(arrays["response"]) & (arrays["response"] >= 0)).all():
        raise _broken(path, "its answers are not finite")
    graph = tuple(sorted(str(digest) for digest in np.atleast_1d(arrays["graph"])))
    if not graph or not all(DIGEST.fullmatch(digest) for digest in graph):
        raise _broken(path, "it names no graph")
    rows = tuple(_row(path, arrays, index) for index in range(count))
    parts = np.split(expected, np.cumsum(lengths)[:-1])
    return CheckSet(kind, floor, graph, rows, tuple(parts), tuple(float(one) for one in arrays["response"]))


def _row(path: Path, arrays: Mapping[str, NDArray[Any]], index: int) -> CheckRow:
    purpose, seed, batch, frames = (int(arrays[name][index]) for name in ("purpose", "seed", "batch", "frames"))
    sigma, seconds = (tuple(float(v) for v in arrays[name][index] if np.isfinite(v)) for name in ("sigma", "seconds"))
    fits = purpose < len(PURPOSES) and 0 <= seed < 2**31 and 1 <= batch <= MAX_BATCH
    of_dit = batch if str(arrays["kind"]) == "dit" else 0
    if not fits or not 1 <= frames <= shapes.MAX_FRAMES or not len(sigma) == len(seconds) == of_dit:
        raise _broken(path, f"row {index} is malformed")
    return CheckRow(purpose, seed, batch, frames, sigma, seconds)


def _broken(path: Path, why: str) -> ToolError:
    return ToolError(f"{path} is not a file of check rows: {why}", "delete it and make the graph or engine again")
