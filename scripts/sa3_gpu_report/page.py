"""The page and the document of a report, and the matrix that the README makes of kept documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa3_gpu_report.host import BACKENDS, Host
from sa3_gpu_report.parts import FAILED, PASSED, SKIPPED, Outcome
from sa3_gpu_report.plan import COLUMNS, SPEED
from sa3_trt_core import console
from sa3_trt_core.errors import ToolError

FORMAT, KIND = 1, "sa3_trt gpu report"
LARGEST = 4 << 20  # bytes of a kept document
LIBRARIES = {
    "tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt-rtx"), "torch": ("torch",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
}  # fmt: skip
HEADER = ("backend", "card", "library, driver", *COLUMNS)


def document(host: Host, outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a report, for report.json."""
    parts = [outcome.as_dict() for outcome in outcomes]
    return {"format": FORMAT, "kind": KIND, **about, "verdict": verdict(parts), "host": host.as_dict(), "parts": parts}


def verdict(parts: Sequence[Mapping[str, Any]]) -> str:
    """The first line of the page: what failed, or what passed."""
    by_status = {status: [part["name"] for part in parts if part["status"] == status] for status in (PASSED, FAILED)}
    skipped = sum(part["status"] == SKIPPED for part in parts)
    rest = f", {skipped} could not be run here" if skipped else ""
    if by_status[FAILED]:
        return f"FAILED: {', '.join(by_status[FAILED])} ({len(by_status[PASSED])} parts passed{rest})"
    if not by_status[PASSED]:
        return f"NOTHING RAN{rest}"
    return f"PASSED: {len(by_status[PASSED])} parts{rest}"


def markdown(report: Mapping[str, Any]) -> str:
    """The page: verdict, machine, what is missing, one line a part."""
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
    found = part["figures"]
    if "bench" in found:
        return "; ".join(f"{one['ms']:.2f} ms {one['engine']} at {one['frames']}" for one in found["bench"])
    return ", ".join(f"{name} {_cell(value)}" for name, value in found.items())


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """The kept documents of a folder, by file name. Raises ToolError for a file that is not one."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_bytes()) if path.stat().st_size <= LARGEST else None
        except (OSError, ValueError, RecursionError):
            report = None
        if not isinstance(report, dict) or report.get("kind") != KIND or report.get("format") != FORMAT:
            raise ToolError(f"{path} is not a report of scripts/gpu_report.py", "remove it, or make it again")
        found.append(report)
    return found


def matrix(reports: Iterable[Mapping[str, Any]]) -> str:
    """The README's table: backend, card and library against what ran; empty where no kept report says anything."""
    rows = [row for report in reports for row in _rows(report)]
    rows += [[backend, *[""] * (len(HEADER) - 1)] for backend in BACKENDS if backend not in [row[0] for row in rows]]
    return console.markdown(HEADER, sorted(rows, key=lambda row: (BACKENDS.index(row[0]), row[1:])))


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """A row for every backend of which a part was run."""
    host, made = report["host"], []
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
            made.append([backend, card, library, *(_said(parts.get(column)) for column in COLUMNS)])
    return made


def _said(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return ""
    if part["status"] == FAILED:
        return "**failed**"
    found = part["figures"]
    if part["column"] == SPEED:
        fp8 = [one for one in found["bench"] if one["engine"].startswith("fp8")]
        return "; ".join(f"{one['ms']:.2f} ms at {one['frames']}" for one in fp8)
    if "gates" in found:
        return f"{found['gates'] - found['failed']} of {found['gates']}, cosine {found['worst denoised cosine']:.4f}"
    if "engines" in found:
        return f"{found['engines']} engines, {_cell(found['worst of the limit'])} of the limit"
    return "yes"
