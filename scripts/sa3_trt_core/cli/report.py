"""Print the plan, or the results by stage, as a table or as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3_trt_core import console, engines, shapes, targets
from sa3_trt_core.hub import resolve
from sa3_trt_core.model_loader import Plan
from sa3_trt_core.request import Request

_ENGINE_OF = {"dit": "sample", "decoder": "decode"}  # engine -> stage of the table in which it is timed
STAGES = ("load", "text", "encode", "sample", "decode", "write")


@dataclass
class Totals:
    """Seconds of each stage over all rows, peak GPU memory after it, and peak sample of each row.

    `elapsed` is the wall time from the first stage to the last file; overlapping stages count once.
    Loading is excluded, except with several devices, whose processes load on their own. `kept` are the rows whose files
    existed before.
    """

    timings: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    peaks: dict[int, float] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)  # of each stage: cuda or cpu
    kept: set[int] = field(default_factory=set)
    elapsed: float = 0.0

    @property
    def rate(self) -> float:
        """Generations per second."""
        return len(self.peaks) / self.elapsed if self.elapsed else 0.0

    def add(self, timings: Mapping[str, float], memory: Mapping[str, int] | None = None) -> None:
        for stage, seconds in timings.items():
            self.timings[stage] = self.timings.get(stage, 0.0) + seconds
        for stage, used in (memory or {}).items():
            self.memory[stage] = max(used, self.memory.get(stage, 0))


def show_plan(plan: Plan, requests: Sequence[Request], outs: Sequence[Path], as_json: bool) -> None:
    """Print the plan and output files of a run. Opens, loads and downloads nothing."""
    stages, place = [], plan.source
    for stage in plan.stages:
        target = plan.targets[stage]
        local = resolve.local_onnx(place.onnx_root, target) if place.onnx_root is not None else None
        root = str(place.onnx_root or f"{targets.HUB_REPOSITORY}/{targets.HUB_FOLDER}")
        onnx = str(local or f"{root}/{target.onnx[0]}")
        backend = engines.BACKENDS[plan.backends[stage]]
        source = str(backend.engine_path(place.models_dir, "<arch>", target)) if backend.suffix else onnx
        stages.append({"stage": stage, "target": target.name, "backend": plan.backends[stage], "file": source})
    if as_json:
        print(
            json.dumps({"stages": stages, "rows": [_row(*pair) for pair in zip(requests, outs, strict=True)]}, indent=2)
        )
        return
    print(console.table(["stage", "target", "backend", "file"], [list(stage.values()) for stage in stages]))
    for request, out in zip(requests, outs, strict=True):
        print(f"{request.mode}: {request.frames} latent frames, {request.steps} steps, seed {request.seed} -> {out}")


def show_result(
    plan: Plan, requests: Sequence[Request], outs: Sequence[Path], totals: Totals, latents: Path | None, as_json: bool
) -> None:
    """Print the written files with time and memory by stage."""
    order = [stage for stage in STAGES if stage in totals.timings]
    if as_json:
        rows = [
            {**_row(request, out), "peak": round(totals.peaks[index], 6)}
            if index not in totals.kept
            else {**_row(request, out), "kept": True}
            for index, (request, out) in enumerate(zip(requests, outs, strict=True))
        ]
        document: dict[str, Any] = {
            "rows": rows,
            "latents": str(latents) if latents else None,
            "sample_rate": shapes.SAMPLE_RATE,
            "engines": {stage: [plan.targets[stage].name, plan.backends[stage]] for stage in plan.stages},
            "devices": totals.devices,
            "timings": {stage: round(totals.timings[stage], 6) for stage in order},
            "memory": totals.memory,
            "generations_per_second": round(totals.rate, 6),
        }
        print(json.dumps(document, indent=2))
        return
    header = ["stage", "seconds", "device", *(["GPU memory"] if totals.memory else [])]
    where = {_ENGINE_OF.get(stage, stage): device for stage, device in totals.devices.items()}
    cells = [[stage, f"{totals.timings[stage]:.2f}", where.get(stage, "-")] for stage in order]
    cells.append([f"all {len(requests)}, elapsed", f"{totals.elapsed:.2f}", "-"])
    if totals.memory:
        for line in cells:
            used = totals.memory.get(line[0])
            line.append("-" if used is None else console.format_bytes(used))
    print(console.table(header, cells))
    if totals.kept:
        print(f"{len(totals.kept)} were there already")
    print(f"{totals.rate:.3g} generations a second")
    if latents is not None:
        print(f"{latents}  latents, {requests[0].valid_frames} frames")
    for request, out in zip(requests, outs, strict=True):
        print(f"{out}  {shapes.output_samples(request.seconds) / shapes.SAMPLE_RATE:.2f} s, seed {request.seed}")


def _row(request: Request, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "prompt": request.prompt,
        "mode": request.mode,
        "seconds": request.seconds,
        "samples": shapes.output_samples(request.seconds),
        "frames": request.frames,
        "valid_frames": request.valid_frames,
        "steps": request.steps,
        "seed": request.seed,
    }
