"""Which parts make up a report on a host: the demonstration model, then every backend that is there."""

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
class Wanted:
    """What is asked for: `tiny` uses random weights of the least size; `onnx_root` graphs that are there already."""

    out: Path
    tiny: bool
    onnx_root: Path | None

    @property
    def work(self) -> Path:
        """Where the parts write for themselves: graphs, engines, whole reports. Not for sending."""
        return self.out / "work"

    @property
    def root(self) -> Path:
        """Where the graphs lie."""
        return self.onnx_root or self.work / "onnx"

    @property
    def models(self) -> Path:
        """Where engines go."""
        return self.work / "models"


def parts_of(wanted: Wanted, host: Host) -> list[Part]:
    """Every part, in order. A part that cannot run here is there too, and says why it is skipped."""
    graphs = [] if wanted.onnx_root is not None else _graphs(wanted)
    last = (graphs[-1].name,) if graphs else ()
    parts = [*graphs]
    for backend in BACKENDS:
        parts += _backend(wanted, host, backend, last)
    gpu = None if host.arch is not None else "no NVIDIA GPU is visible"
    parts.append(
        Part("tests of the GPU", _python("-m", "pytest", "tests/gpu", "-rs"), 180, skip=gpu or _needs(host, "pytest"))
    )
    if not GENERATE.is_file():
        parts.append(Part("bench_generate", (), 0, skip="scripts/bench_generate.py is not there"))
    else:
        parts.append(_generate(wanted, gpu))
    return parts


def _python(*line: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, line))


def _script(folder: str, name: str, *line: object) -> tuple[str, ...]:
    return _python(ROOT / folder / name, *line)


def _needs(host: Host, module: str) -> str | None:
    return f"{module} is not installed" if module in host.missing else None


def _graphs(wanted: Wanted) -> list[Part]:
    """The chain from weights to an FP8 graph: the demonstration model's, or random ones of the least size."""
    work, root = wanted.work, wanted.root
    checkpoint, calibration = work / "checkpoint", work / "sa3-m.calib.npz"
    dit, half, fp8 = (root / targets.dit_target("medium", p).onnx[0] for p in ("fp32", "fp16mixed", "fp8"))
    captured = ("--prompts", 2, "--duration", 0.5, "--steps", 4) if wanted.tiny else ("--prompts", 3, "--duration", 5)
    lines: list[tuple[str, tuple[object, ...]]] = [
        ("make_demo_checkpoint", ("--out", checkpoint, *(TINY if wanted.tiny else ()))),
        ("export_onnx", ("--model-dir", checkpoint, "--onnx-root", root)),
        ("build_dit_fp16mixed", ("--input", dit, "--onnx", half)),
        ("make_calib", ("--model-config", checkpoint / "model_config.json", "--checkpoint",
                        checkpoint / "model.safetensors", "--out", calibration, *captured)),
        ("build_dit_fp8", ("--input", half, "--calib", calibration, "--onnx", fp8, "--ptq", "direct",
                           "--parity-rows", 8, "--rollouts", 0)),
    ]  # fmt: skip
    made: list[Part] = []
    before: tuple[str, ...] = ()
    for name, line in lines:
        made.append(Part(name, _script("build", f"{name}.py", *line), 300, after=before))
        before = (name,)
    return made


def _backend(wanted: Wanted, host: Host, backend: str, graphs: tuple[str, ...]) -> list[Part]:
    """Build, check rows, gates and speed of one backend."""
    absent = host.absent.get(backend)
    where = ("--onnx-root", wanted.root, "--models-dir", wanted.models)
    dits = ("sa3-m", "sa3-m-fp8")
    compiles = backend in engines.BUILT and engines.BUILT[backend].runs == engines.EVERYTHING
    names = (*dits, *(name for name in OTHERS if _runs(backend, name)))
    built = f"{backend}, build"
    parts, needed = [], graphs
    if backend in engines.BUILT:
        report = ("--engine-report",) if compiles else ()
        line = _script("build", "build_from_onnx.py", *names, "--backend", backend, *where, *report)
        parts.append(Part(built, line, 300, backend, BUILD, graphs, skip=absent))
        needed = (*graphs, built)
    checked = wanted.work / f"check_{backend}.json"
    line = _script("scripts", "check_engine.py", *names, "--backend", backend, *where, "--out", checked)
    parts.append(Part(
        f"{backend}, check rows", line, 120, backend, CHECK, needed, partial(_checked, checked), absent
    ))  # fmt: skip
    out = wanted.work / f"validation_{backend}"
    short = ("--prompts", 1, "--seconds", 0.5, "--steps", 4) if wanted.tiny else ("--prompts", 2, "--seconds", 5)
    line = _script(
        "scripts", "validate_fp8.py", "--reference-backend", "onnxruntime", "--candidate-backend", backend, "--backend",
        "onnxruntime", *where, *short, "--extra", 0, "--no-audio", "--out", out,
    )  # fmt: skip
    parts.append(Part(
        f"{backend}, gates", line, 240, backend, GATES, needed, partial(_gates, out),
        absent or _needs(host, "matplotlib"),
    ))  # fmt: skip
    gpu = None if host.arch is not None else "no NVIDIA GPU is visible"
    bench = wanted.work / f"bench_{backend}"
    line = _script(
        "scripts", "bench_dit.py", "--out", bench, "--engines", f"fp16mixed@{backend}", f"fp8@{backend}", *where,
        "--lengths", 120, 646, "--batches", "--repeats", 50,
    )  # fmt: skip
    skip = absent or gpu or ("it is the reference, not a product" if backend == engines.DIRECT.name else None)
    parts.append(Part(f"{backend}, speed", line, 120, backend, SPEED, needed, partial(_speed, bench), skip))
    return parts


def _generate(wanted: Wanted, gpu: str | None) -> Part:
    out = wanted.work / "bench_generate"
    line = _script(
        "scripts", "bench_generate.py", "--out", out, "--seconds", 3, 30, "--precisions", "fp8", "fp16mixed", "--peers",
        "--repeats", 5, "--untuned",
    )  # fmt: skip
    return Part("bench_generate", line, 180, figures=partial(_generated, out), skip=gpu)


def _runs(backend: str, name: str) -> bool:
    return engines.BACKENDS[backend].supports(targets.find_target(name))


def _checked(path: Path) -> dict[str, Any]:
    found = read_json(path)["engines"]
    worst = [one["worst"] for one in found if one["worst"] is not None]  # None: its graph brings no rows
    return {
        "engines": len(found),
        "without rows": len(found) - len(worst),
        "worst of the limit": max(worst, default=None),
    }


def _gates(folder: Path) -> dict[str, Any]:
    report = read_json(folder / "report.json")
    cosine = report["single_step"]["by_kind"]["text"]["denoised"]["cosine"]
    return {
        "gates": len(report["gates"]), "failed": sum(not gate["passed"] for gate in report["gates"]),
        "worst denoised cosine": cosine["worst"], "mean": cosine["mean"],
    }  # fmt: skip


def _speed(folder: Path) -> dict[str, Any]:
    timings = read_json(folder / "bench.json")["timings"]
    return {"bench": [{"engine": one["contestant"], "frames": one["frames"], "rows": one["rows"], "ms": one["ms"]}
                      for one in timings]}  # fmt: skip


def _generated(folder: Path) -> dict[str, Any]:
    timings = read_json(folder / "generate.json")["timings"]
    return {f"{one['contestant']}, {one['seconds']:g} s: ms": one["ms"] for one in timings}
