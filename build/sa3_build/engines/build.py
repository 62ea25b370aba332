"""Build many engines in one run; an engine that fails does not stop the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_build.engines import inspector, prebuilt, refittable, tensorrt as compiler
from sa3_build.engines.builders import BUILDERS
from sa3_trt_core import engines, gpu
from sa3_trt_core.artifacts import files
from sa3_trt_core.console import Progress, format_bytes, format_seconds, table
from sa3_trt_core.errors import GATE_EXIT, USAGE_EXIT, GateError, ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import PREBUILT_TENSORRT, Target


@dataclass(frozen=True)
class BuildJob:
    """One engine to build."""

    target: Target
    arch: str
    out: Path


@dataclass(frozen=True)
class BuildOptions:
    """BuildOptions of all jobs: see build_from_onnx.py --help."""

    backend: str
    source: ModelSource
    force: bool = False
    best_of: int = 1
    report: bool = False
    prebuilt: bool = False
    refits: bool = False


@dataclass(frozen=True)
class BuildOutcome:
    """Result of a job: the engine and its report, or the error."""

    job: BuildJob
    built: compiler.Built | None = None
    report: inspector.EngineReport | None = None
    error: ToolError | None = None

    @property
    def state(self) -> str:
        """The state: built, current or failed."""
        if self.error is not None or self.built is None:
            return "failed"
        return "current" if self.built.reused else "built"

    @property
    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        entry: dict[str, Any] = {"target": self.job.target.name, "arch": self.job.arch, "state": self.state}
        if self.built is not None:
            entry |= {"path": str(self.built.path), "bytes": self.built.bytes, "seconds": self.built.seconds}
            entry |= {"reused": self.built.reused, "why": self.built.why}
        if self.report is not None:
            entry["layers"] = self.report.as_dict
        if self.error is not None:
            entry |= {"error": self.error.message, "hint": self.error.hint}
        return entry


def require_possible(jobs: Sequence[BuildJob], options: BuildOptions) -> None:
    """Raise ToolError for options or paths that no job can use, before anything is read or downloaded."""
    if options.best_of > 1 and gpu.current_arch() is None:
        raise ToolError("--best-of requires an NVIDIA GPU to measure engines", "omit it, or use a machine with a GPU")
    if options.report and gpu.current_arch() is None:
        raise ToolError(
            "--engine-report requires an NVIDIA GPU to load the engine", "omit it, or use a machine with a GPU"
        )
    builder = BUILDERS[options.backend]
    for job in jobs:
        compiler.require_arch(job.target, options.backend, job.arch)
        files.require_writable(job.out, "engine")
        engines.BACKENDS[options.backend].require_engine(job.target)
        if options.refits:
            refittable.require_possible(job.target, options.backend)
    if not builder.compiles:
        if options.best_of > 1 or options.report or options.prebuilt:
            raise ToolError(
                "--best-of, --engine-report and --prebuilt are only available with a TensorRT backend", "omit them"
            )
        return
    if options.prebuilt and options.refits:
        raise ToolError("prebuilt engines are not refittable", "omit --prebuilt or --refittable")
    version = str(compiler.load_backend(options.backend).__version__)
    matches = version == builder.prebuilt
    if options.prebuilt and not matches:
        raise ToolError(
            f"prebuilt engines require TensorRT {PREBUILT_TENSORRT}; installed: {options.backend} {version}",
            "omit --prebuilt to compile the engines",
        )
    if matches and not options.prebuilt:
        print(
            "the hub has engines for this TensorRT version: --prebuilt downloads them instead of compiling",
            file=sys.stderr,
        )


def build_all(jobs: Sequence[BuildJob], options: BuildOptions) -> list[BuildOutcome]:
    """Build every engine that is not current; errors are printed at once and stored in the outcomes.

    If there is only one job, its ToolError is raised instead.
    """
    outcomes = []
    with Progress("engines", len(jobs), "engines") as progress:
        for job in jobs:
            outcome = _attempt(job, options)
            if outcome.error is not None and len(jobs) == 1:
                raise outcome.error
            if outcome.error is not None:
                print(f"{job.target.name} {job.arch}: {outcome.error.lines()}", file=sys.stderr, flush=True)
            outcomes.append(outcome)
            progress.advance(note=f"{job.target.name} {job.arch}: {outcome.state}")
    return outcomes


def require_all(outcomes: Sequence[BuildOutcome]) -> None:
    """Raise a ToolError that lists the failed engines: exit code 3 if only gates failed, else 2."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if not failed:
        return
    names = ", ".join(f"{outcome.job.target.name} {outcome.job.arch}" for outcome in failed)
    only_gates = all(isinstance(outcome.error, GateError) for outcome in failed)
    raise ToolError(
        f"{len(failed)} of {len(outcomes)} engines failed: {names}",
        "see the errors above; rerun the command to build only the missing engines",
        GATE_EXIT if only_gates else USAGE_EXIT,
    )


def summary(outcomes: Sequence[BuildOutcome]) -> str:
    """Return the table of outcomes as text."""
    rows = []
    for outcome in outcomes:
        built = outcome.built
        seconds = "-" if built is None or built.reused else format_seconds(built.seconds)
        size, path = ("-", "-") if built is None else (format_bytes(built.bytes), str(built.path))
        reason = " ".join(outcome.error.message.split()) if outcome.error is not None else built.why if built else ""
        rows.append([outcome.job.target.name, outcome.job.arch, outcome.state, seconds, size, path, reason])
    text = table(("target", "arch", "state", "built in", "size", "engine", "why"), rows)
    for outcome in outcomes:
        if outcome.report is not None:
            text += f"\n\n{outcome.job.target.name} {outcome.job.arch}\n{_counts(outcome.report)}"
    return text


def _counts(report: inspector.EngineReport) -> str:
    return table(tuple(report.as_dict), [[str(count) for count in report.as_dict.values()]])


def _attempt(job: BuildJob, options: BuildOptions) -> BuildOutcome:
    built = None
    try:
        built = _make(job, options)
        if not options.report:
            return BuildOutcome(job, built)
        report = inspector.inspect(job.out, options.backend)
        failed_gates = inspector.broken_gates(report, job.target)
        error = None
        if failed_gates:
            error = GateError(
                f"{job.out}: {'; '.join(failed_gates)}", "the engine is kept; see the counts", _counts(report)
            )
        return BuildOutcome(job, built, report, error)
    except ToolError as error:
        return BuildOutcome(job, built, error=error)


def _make(job: BuildJob, options: BuildOptions) -> compiler.Built:
    if options.prebuilt:
        settings = compiler.build_settings(job.target, options.backend, job.arch)
        size, reused = prebuilt.take(job.target, job.arch, job.out, settings, options.source)
        return compiler.Built(job.out, 0.0, size, reused, "prebuilt, from the hub")
    source = resolve.resolve_onnx(job.target, options.source)
    build = BUILDERS[options.backend].build
    return build(source, job.target, job.arch, job.out, options.force, options.best_of, options.refits)
