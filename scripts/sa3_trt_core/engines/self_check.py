"""Run an engine on the check rows of its graph, once per card, driver and library, and refuse it when it is wrong."""

from __future__ import annotations

import datetime
import importlib
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_trt_core import gpu
from sa3_trt_core.artifacts import check_rows, files, manifest
from sa3_trt_core.artifacts.check_rows import DURATIONS, NOISE_LEVELS, CheckRow, CheckSet, check_path
from sa3_trt_core.artifacts.external_data import external_data_names
from sa3_trt_core.errors import GateError

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.backend import Backend
    from sa3_trt_core.engines.base import GraphEngine

Run = Callable[[Mapping[str, "Tensor"]], dict[str, "Tensor"]]
LIMIT = 2.0  # times the graph's own response to noise; other kernels measure 1.0 to 1.1 (build/NOTES.md)
MIN_SHARE = 0.01  # least share of the graph's response to two values that collide in fp16
DIT_FLOORS = {"fp8": 1e-3, "fp16mixed": 2e-2, "fp32": 2e-2}  # allowed relative L2 of a DiT, whatever its response
# Sine gates amplify rounding differences of another summation order, and noise is out of their training distribution.
OTHER_FLOORS = {"t5gemma": 2e-2, "same-decoder": 1e-1, "same-encoder": 1e-1}
ANSWERS_SUFFIX = ".checked.json"
ANSWERS_FORMAT, MAX_ANSWERS, MAX_BYTES = 1, 16, 1 << 20
REPORT = "python scripts/gpu_report.py"


@dataclass(frozen=True)
class CheckEnvironment:
    """Environment in which a check is valid: card, driver and version of the library that runs the engine."""

    card: str
    driver: str
    library: str

    @classmethod
    def of(cls, backend: Backend) -> CheckEnvironment:
        """Return this machine's environment for a backend: its card, or the CPU architecture."""
        module, on_gpu = importlib.import_module(backend.package), backend.on_gpu()
        card = f"{gpu.card_name()} ({gpu.current_arch()})" if on_gpu else f"CPU ({platform.machine()})"
        library = f"{backend.package} {getattr(module, '__version__', 'unknown')}"
        return cls(card, gpu.driver_version() if on_gpu else "none", library)


@dataclass(frozen=True)
class CheckOutcome:
    """Outcome of one row: its name, its error as a multiple of the limit, and the failure message or None."""

    row: str
    error_over_limit: float
    failure: str | None


def make_checks(kind: str, precision: str, run: Run, graph: Iterable[str]) -> CheckSet:
    """Return the check rows of a graph, computed by running it (ONNX Runtime) on every row.

    An FP8 graph is also run with noise on the inputs: a tiny difference there changes how activations round. `graph`
    are the digests of its files. Raises GateError for a non-finite output.
    """
    floor = DIT_FLOORS[precision] if kind == "dit" else OTHER_FLOORS[kind]
    rows, expected, response = check_rows.planned_rows(kind), [], []
    for row in rows:
        answer = check_rows.stored_part(kind, row, run(check_rows.inputs_of(kind, row)))
        if not np.isfinite(answer).all():
            raise GateError(f"the graph gives no finite output for its check row {row.name}", "report the graph")
        moved = answer
        if precision == "fp8":
            moved = check_rows.stored_part(kind, row, run(check_rows.inputs_of(kind, row, nudged=True)))
        expected.append(answer)
        response.append(_norm(moved - answer))
    return CheckSet(kind, floor, tuple(sorted(graph)), rows, tuple(expected), tuple(response))


def outcomes(checks: CheckSet, run: Run) -> list[CheckOutcome]:
    """Compare an engine with the stored outputs of its graph on every row."""
    return [_outcome(checks, index, run) for index in range(len(checks.rows))]


def _failures(results: Iterable[CheckOutcome]) -> list[str]:
    return [result.failure for result in results if result.failure is not None]


def _outcome(checks: CheckSet, index: int, run: Run) -> CheckOutcome:
    row, expected = checks.rows[index], checks.expected[index]
    answer = check_rows.stored_part(checks.kind, row, run(check_rows.inputs_of(checks.kind, row)))
    if answer.shape != expected.shape:
        return CheckOutcome(row.name, math.inf, f"{row.name}: {answer.size} values, the graph gives {expected.size}")
    if not np.isfinite(answer).all():
        return CheckOutcome(row.name, math.inf, f"{row.name}: values that are not finite")
    allowed = max(LIMIT * checks.response[index], checks.floor * _norm(expected))
    distance = _norm(answer - expected)
    error_over_limit = distance / allowed if allowed else (0.0 if not distance else math.inf)
    share = _share(row, expected, answer)
    failure = None
    if not error_over_limit <= 1.0:
        off = distance / max(_norm(expected), 1e-30)
        failure = f"{row.name}: relative L2 {off:.3g} from the graph, {error_over_limit:.2f} times the limit"
    elif share is not None and share < MIN_SHARE:
        what = check_rows.PURPOSES[row.purpose]
        failure = f"{row.name}: two {what} that differ in fp32 give {share:.2g} of the graph's difference, limit 0.01"
    return CheckOutcome(row.name, error_over_limit, failure)


def _share(row: CheckRow, expected: np.ndarray, answer: np.ndarray) -> float | None:
    """Return the engine's share of the graph's difference between the two rows of a probe; None for other rows."""
    if row.purpose not in (NOISE_LEVELS, DURATIONS):
        return None
    wanted, answered = (_norm(np.subtract(*side.reshape(2, -1))) for side in (expected, answer))
    return answered / wanted if wanted else None


def require_correct(
    engine: GraphEngine,
    path: Path,
    environment: CheckEnvironment,
    rebuild: str,
    graph: Path | None = None,
    again: bool = False,
) -> list[CheckOutcome]:
    """Check an engine unless it passed before in the same environment with the same bytes.

    `path` is the engine's file, `graph` its ONNX (None: unknown), whose check rows take precedence. The bytes are
    compared with their digests, then the rows are run; `again` ignores earlier results. Returns the outcomes, empty if
    nothing was run. Raises GateError for a wrong engine, ToolError for unreadable rows.
    """
    rows = next((check_path(at) for at in (graph, path) if at is not None and check_path(at).is_file()), None)
    key = {**vars(environment), "engine": _stamp(path), "rows": None if rows is None else _stamp(rows)}
    if not again and key in [answer.get("key") for answer in _answers(path)]:
        return []
    checks = None if rows is None else check_rows.read(rows)
    changed = changed_bytes(path, checks)
    if changed is not None:
        raise GateError(f"{path} changed since it was built: {changed}", f"build it again: {rebuild}")
    if checks is None:
        _keep(path, key, 0.0)  # otherwise every start would hash every byte again
        return []
    results = outcomes(checks, engine.run)
    failures = _failures(results)
    if failures:
        raise GateError(
            f"{path} fails {len(failures)} of {len(results)} check rows on {environment.card} ({environment.library}): "
            f"{failures[0]}",
            f"make it again: {rebuild}; if it fails again, report it with the folder that {REPORT} writes",
            "\n".join(failures[1:]) or None,
        )
    _keep(path, key, max(one.error_over_limit for one in results))
    return results


def require_refitted(engine: GraphEngine, graph: Path, label: str) -> None:
    """Run a refitted engine on the check rows of the merged graph. Raises GateError if a row fails."""
    if not check_path(graph).is_file():
        return
    failures = _failures(outcomes(check_rows.read(check_path(graph)), engine.run))
    if failures:
        raise GateError(
            f"{label}, refitted with {graph}, fails {len(failures)} check rows: {failures[0]}",
            "omit --refit: sa3_trt then prints the two commands that build a merged engine",
        )


def changed_bytes(path: Path, checks: CheckSet | None) -> str | None:
    """Return why the bytes of an engine or a graph differ from its manifest or its check rows, or None.

    Every byte is hashed. The digests of the rows' graph must be those of a graph file, or be among the inputs in an
    engine's manifest.
    """
    record = manifest.read_manifest(path)
    changed = manifest.verify_manifest(path, deep=True) if record is not None else None
    if changed is not None or checks is None:
        return changed
    if path.suffix == ".onnx":
        names = [path.name, *external_data_names(path)]
        if sorted(files.sha256_of(path.with_name(name)) for name in names) != list(checks.graph):
            return f"{check_path(path).name} holds the answers of other bytes"
    elif record is not None and not set(checks.graph) <= set(record.inputs.values()):
        return "it was built from another graph than its check rows"
    return None


def _stamp(path: Path) -> list[Any]:
    """Return name, size, mtime and sampled digest of an artefact's files, which identify its bytes."""
    record = manifest.read_manifest(path) if manifest.manifest_path(path).is_file() else None
    sidecars = external_data_names(path) if path.suffix == ".onnx" else []
    names = sorted({path.name, *sidecars, *(record.files if record is not None else ())})
    return [
        [name, stat.st_size, stat.st_mtime_ns, files.sampled_digest(file)]
        for name in names
        if (file := path.parent / name).is_file() and (stat := file.stat())
    ]


def _answers(path: Path) -> list[dict[str, Any]]:
    """Return the stored checks beside an engine; an empty list if they cannot be read."""
    kept = path.with_name(path.name + ANSWERS_SUFFIX)
    try:
        document = json.loads(kept.read_bytes()) if kept.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return []
    known = document.get("answers") if isinstance(document, dict) and document.get("format") == ANSWERS_FORMAT else None
    return [one for one in known if isinstance(one, dict)] if isinstance(known, list) else []


def _keep(path: Path, key: Mapping[str, Any], worst: float) -> None:
    """Store that an engine passed; in a read-only folder it is checked again next time."""
    entry = {"key": dict(key), "worst": worst, "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}
    document = {"format": ANSWERS_FORMAT, "answers": [*_answers(path)[1 - MAX_ANSWERS :], entry]}
    try:
        files.write_atomic_text(path.with_name(path.name + ANSWERS_SUFFIX), json.dumps(document, indent=1) + "\n")
    except OSError:
        return


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))
