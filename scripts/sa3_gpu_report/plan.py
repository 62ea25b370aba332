"""Parts of a report on a host: the demonstration model, then every installed backend."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sa3_gpu_report.host import BACKENDS, Host
from sa3_gpu_report.parts import ROOT, Part, read_json
from sa3_trt_core import engines, targets

BUILD, CHECK, GATES, SPEED = "build", "check rows", "gates", "speed"
COLUMNS = (BUILD, CHECK, GATES, SPEED)
OTHERS = (targets.TEXT_ENCODER, "same-l-decoder")  # built and checked where the backend runs them
GENERATE = ROOT / "scripts" / "bench_generate.py"
TINY = ("--random", "--width", "128", "--depth", "1")


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report: `tiny` uses random weights of minimal size; `onnx_root` is a folder of existing graphs."""

    out: Path
    tiny: bool
    onnx_root: Path | None

    @property
    def work(self) -> Path:
        """Return the work folder of the parts (graphs, engines, whole reports), which is not sent."""
        return self.out / "work"

    @property
    def root(self) -> Path:
        """Return the folder of the graphs."""
        return self.onnx_root or self.work / "onnx"

    @property
    def models(self) -> Path:
        """Return the folder of the engines."""
        return self.work / "models"


def report_parts(options: ReportOptions, host: Host) -> list[Part]:
    """Return every part, in order. A part that cannot run here is included with the reason for skipping it."""
    graphs = [] if options.onnx_root is not None else _graphs(options)
    last = (graphs[-1].name,) if graphs else ()
    parts = [*graphs]
    for backend in BACKENDS:
        parts += _backend(options, host, backend, last)
    gpu = None if host.arch is not None else "no NVIDIA GPU is visible"
    parts.append(
        Part("tests of the GPU", _python("-m", "pytest", "tests/gpu", "-rs"), 180, skip=gpu or _needs(host, "pytest"))
    )
    if not GENERATE.is_file():
        parts.append(Part("bench_generate", (), 0, skip="scripts/bench_generate.py is missing"))
    else:
        parts.append(_generate(options, gpu))
    return parts


def _python(*argv: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, argv))


def _script(folder: str, name: str, *argv: object) -> tuple[str, ...]:
    return _python(ROOT / folder / name, *argv)


def _needs(host: Host, module: str) -> str | None:
    return f"{module} is not installed" if module in host.missing else None


def _graphs(options: ReportOptions) -> list[Part]:
    """Return the parts from weights to an FP8 graph: the demonstration model, or random weights of minimal size."""
    work, root = options.work, options.root
    checkpoint, calibration = work / "checkpoint", work / "sa3-m.calib.npz"
    dit, half, fp8 = (root / targets.dit_target("medium", p).onnx[0] for p in ("fp32", "fp16mixed", "fp8"))
    captured = ("--prompts", 2, "--duration", 0.5, "--steps", 4) if options.tiny else ("--prompts", 3, "--duration", 5)
    commands: list[tuple[str, tuple[object, ...]]] = [
        ("make_demo_checkpoint", ("--out", checkpoint, *(TINY if options.tiny else ()))),
        ("export_onnx", ("--model-dir", checkpoint, "--onnx-root", root)),
        ("build_dit_fp16mixed", ("--input", dit, "--onnx", half)),
        ("make_calib", ("--model-config", checkpoint / "model_config.json", "--checkpoint",
                        checkpoint / "model.safetensors", "--out", calibration, *captured)),
        ("build_dit_fp8", ("--input", half, "--calib", calibration, "--onnx", fp8, "--ptq", "direct",
                           "--parity-rows", 8, "--rollouts", 0)),
    ]  # fmt: skip
    parts: list[Part] = []
    before: tuple[str, ...] = ()
    for name, argv in commands:
        parts.append(Part(name, _script("build", f"{name}.py", *argv), 300, after=before))
        before = (name,)
    return parts


def _backend(options: ReportOptions, host: Host, backend: str, graphs: tuple[str, ...]) -> list[Part]:
    """Return the parts of one backend: build, check rows, gates and speed."""
    absent = host.absent.get(backend)
    where = ("--onnx-root", options.root, "--models-dir", options.models)
    dits = ("sa3-m", "sa3-m-fp8")
    compiles = backend in engines.BUILT and engines.BUILT[backend].runs == engines.EVERYTHING
    names = (*dits, *(name for name in OTHERS if _runs(backend, name)))
    built = f"{backend}, build"
    parts, needed = [], graphs
    if backend in engines.BUILT:
        report = ("--engine-report",) if compiles else ()
        argv = _script("build", "build_from_onnx.py", *names, "--backend", backend, *where, *report)
        parts.append(Part(built, argv, 300, backend, BUILD, graphs, skip=absent))
        needed = (*graphs, built)
    checked = options.work / f"check_{backend}.json"
    argv = _script("scripts", "check_engine.py", *names, "--backend", backend, *where, "--out", checked)
    parts.append(Part(
        f"{backend}, check rows", argv, 120, backend, CHECK, needed, partial(_checked, checked), absent
    ))  # fmt: skip
    out = options.work / f"validation_{backend}"
    short = ("--prompts", 1, "--seconds", 0.5, "--steps", 4) if options.tiny else ("--prompts", 2, "--seconds", 5)
    argv = _script(
        "scripts", "validate_fp8.py", "--reference-backend", "onnxruntime", "--candidate-backend", backend, "--backend",
        "onnxruntime", *where, *short, "--extra", 0, "--no-audio", "--out", out,
    )  # fmt: skip
    parts.append(Part(
        f"{backend}, gates", argv, 240, backend, GATES, needed, partial(_gates, out),
        absent or _needs(host, "matplotlib"),
    ))  # fmt: skip
    gpu = None if host.arch is not None else "no NVIDIA GPU is visible"
    bench = options.work / f"bench_{backend}"
    argv = _script(
        "scripts", "bench_dit.py", "--out", bench, "--engines", f"fp16mixed@{backend}", f"fp8@{backend}", *where,
        "--lengths", 120, 646, "--batches", "--repeats", 50,
    )  # fmt: skip
    skip = absent or gpu or ("it is the reference, not a product" if backend == engines.DIRECT.name else None)
    parts.append(Part(f"{backend}, speed", argv, 120, backend, SPEED, needed, partial(_speed, bench), skip))
    return parts


def _generate(options: ReportOptions, gpu: str | None) -> Part:
    out = options.work / "bench_generate"
    argv = _script(
        "scripts", "bench_generate.py", "--out", out, "--seconds", 3, 30, "--precisions", "fp8", "fp16mixed", "--peers",
        "--repeats", 5, "--untuned",
    )  # fmt: skip
    return Part("bench_generate", argv, 180, figures=partial(_generated, out), skip=gpu)


def _runs(backend: str, name: str) -> bool:
    return engines.BACKENDS[backend].supports(targets.find_target(name))


def _checked(path: Path) -> dict[str, Any]:
    engines_checked = read_json(path)["engines"]
    # None: the graph has no check rows.
    worst = [engine["worst"] for engine in engines_checked if engine["worst"] is not None]
    return {
        "engines": len(engines_checked),
        "without_rows": len(engines_checked) - len(worst),
        "worst_of_the_limit": max(worst, default=None),
    }


def _gates(folder: Path) -> dict[str, Any]:
    report = read_json(folder / "report.json")
    cosine = report["single_step"]["by_kind"]["text"]["denoised"]["cosine"]
    return {
        "gates": len(report["gates"]), "failed": sum(not gate["passed"] for gate in report["gates"]),
        "worst_denoised_cosine": cosine["worst"], "mean": cosine["mean"],
    }  # fmt: skip


def _speed(folder: Path) -> dict[str, Any]:
    timings = read_json(folder / "bench.json")["timings"]
    rows = [
        {"engine": timing["contestant"], **{key: timing[key] for key in ("frames", "rows", "ms")}} for timing in timings
    ]
    return {"bench": rows}


def _generated(folder: Path) -> dict[str, Any]:
    timings = read_json(folder / "generate.json")["timings"]
    return {f"{timing['contestant']}, {timing['seconds']:g} s: ms": timing["ms"] for timing in timings}
