"""The page and the document of a report, and the matrix that the README makes of kept documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa3_gpu_report.host import BACKENDS, Host
from sa3_gpu_report.parts import FAILED, PASSED, SKIPPED, PartOutcome
from sa3_gpu_report.plan import COLUMNS, SPEED
from sa3_trt_core import console
from sa3_trt_core.errors import ToolError

FORMAT, KIND = 1, "sa3_trt gpu report"
MAX_BYTES = 4 << 20  # bytes of a kept document
LIBRARIES = {
    "tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt-rtx"), "torch": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
}  # fmt: skip
HEADER = ("backend", "card", "library, driver", *COLUMNS)


def document(host: Host, outcomes: Sequence[PartOutcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole report, for report.json."""
    parts = [outcome.as_dict() for outcome in outcomes]
    return {"format": FORMAT, "kind": KIND, **about, "verdict": verdict(parts), "host": host.as_dict(), "parts": parts}


def verdict(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the first line of the page: failed parts, or the number of passed ones."""
    by_status = {status: [part["name"] for part in parts if part["status"] == status] for status in (PASSED, FAILED)}
    skipped = sum(part["status"] == SKIPPED for part in parts)
    rest = f", {skipped} could not be run here" if skipped else ""
    if by_status[FAILED]:
        return f"FAILED: {', '.join(by_status[FAILED])} ({len(by_status[PASSED])} parts passed{rest})"
    if not by_status[PASSED]:
        return f"NOTHING RAN{rest}"
    return f"PASSED: {len(by_status[PASSED])} parts{rest}"


def markdown(report: Mapping[str, Any]) -> str:
    """Return the page: verdict, machine, missing packages, one line a part."""
    host = report["host"]
    packages = ", ".join(f"{name} {version}" for name, version in host["packages"].items())
    lines = [
        f"**{report['verdict']}**", "", f"# sa3_trt on {host['card']}", "",
        f"{report['created']}, {report['seconds']:.0f} s, project {report['version']}, "
        f"{'random weights of the least size' if report['tiny'] else 'demonstration model'}  ",
        f"{host['arch'] or 'no GPU'}, driver {host['driver']}, Python {host['python']}, {host['system']}, "
        f"{host['cpus']} CPUs  ", packages, "",
    ]  # fmt: skip
    remarks = [f"- missing: {name}, for {what}" for name, what in host["missing"].items()]
    remarks += [f"- {name} runs on the CPU here, not on the card" for name in host["on_cpu"]]
    lines += [*remarks, ""] if remarks else []
    rows = [
        [part["name"], part["status"], f"{part['seconds']:.0f} s", _figures(part), part["why"]]
        for part in report["parts"]
    ]
    lines += [console.markdown(("part", "", "time", "figures", "why"), rows), ""]
    lines += ["Logs are in `logs/`. Send this folder with your issue; it holds no prompt, home path or token.", ""]
    return "\n".join(lines)


def _figures(part: Mapping[str, Any]) -> str:
    figures = part["figures"]
    if "bench" in figures:
        return "; ".join(
            f"{timing['ms']:.2f} ms {timing['engine']} at {timing['frames']}" for timing in figures["bench"]
        )
    return ", ".join(f"{name.replace('_', ' ')} {_cell(value)}" for name, value in figures.items())


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the kept documents of a folder, by file name. Raises ToolError for any other file."""
    reports = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_bytes()) if path.stat().st_size <= MAX_BYTES else None
        except (OSError, ValueError, RecursionError):
            report = None
        if not isinstance(report, dict) or report.get("kind") != KIND or report.get("format") != FORMAT:
            raise ToolError(f"{path} is not a report of scripts/gpu_report.py", "remove it, or make it again")
        reports.append(report)
    return reports


def matrix(reports: Iterable[Mapping[str, Any]]) -> str:
    """Return the README's table: results by backend, card and library; cells without a kept report are empty."""
    rows = [row for report in reports for row in _rows(report)]
    rows += [[backend, *[""] * (len(HEADER) - 1)] for backend in BACKENDS if backend not in [row[0] for row in rows]]
    return console.markdown(HEADER, sorted(rows, key=lambda row: (BACKENDS.index(row[0]), row[1:])))


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for every backend with a part that ran."""
    host, rows = report["host"], []
    for backend in BACKENDS:
        parts = {
            part["column"]: part
            for part in report["parts"]
            if part["backend"] == backend and part["column"] is not None and part["status"] != SKIPPED
        }
        if parts:
            versions = [host["packages"][name] for name in LIBRARIES[backend] if name in host["packages"]]
            card, driver = host["card"], host["driver"]
            if backend in host.get("on_cpu", ()):
                card, driver = f"CPU ({host['system'].split()[-1]})", "none"
            library = f"{versions[0] if versions else 'unknown'}, {driver}"
            rows.append([backend, card, library, *(_result_cell(parts.get(column)) for column in COLUMNS)])
    return rows


def _result_cell(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return ""
    if part["status"] == FAILED:
        return "**failed**"
    # Older reports have spaces in the names of their figures.
    figures = {name.replace(" ", "_"): value for name, value in part["figures"].items()}
    if part["column"] == SPEED:
        fp8 = [timing for timing in figures["bench"] if timing["engine"].startswith("fp8")]
        return "; ".join(f"{timing['ms']:.2f} ms at {timing['frames']}" for timing in fp8)
    if "gates" in figures:
        passed, cosine = figures["gates"] - figures["failed"], figures["worst_denoised_cosine"]
        return f"{passed} of {figures['gates']}, cosine {cosine:.4f}"
    if "engines" in figures:
        return f"{figures['engines']} engines, {_cell(figures['worst_of_the_limit'])} of the limit"
    return "yes"
