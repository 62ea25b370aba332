"""The FP8 recipe: ordered stages from a FP16-mixed DiT and a calibration set to dit_fp8.onnx, its proof and its report.

Each stage leaves its result in a working folder beside the output; a killed run goes on at the stage it was in. The
finished graph, the report and then the manifest appear only when every proof holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sa3_build.graph import check_row_files, contract, io as graph_io
from sa3_build.quantization import activation_ranges, amax, pareto, place_quantizers, round_weights, sensitivity
from sa3_build.quantization.settings import Settings
from sa3_build.quantization.workspace import Workspace
from sa3_build.recipes import fp8_inputs, requirements_check
from sa3_build.recipes.stages import Stage, WorkingFolder
from sa3_build.verification import graph_proof, parity, rollouts
from sa3_trt_core.artifacts import files, manifest
from sa3_trt_core.artifacts.build import Draft, build
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, summary
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_validation.cases import starts_of

REPORT_SUFFIX = ".report.json"
REPORT_FORMAT = 1


def stages_of(work: Workspace) -> list[Stage]:
    """The stages of one build, in order: what each reads and leaves, and the function that does it."""

    def stage(name: str, needs: list[Path], leaves: list[Path], run: Callable[[Workspace], Mapping[str, Any]]) -> Stage:
        return Stage(name, tuple(needs), tuple(leaves), partial(run, work))

    settings, clean, result = work.settings, work.clean, work.result
    rounds = stage("rounding", [clean], [work.codes], round_weights.choose_codes)
    search = stage("sensitivity", [clean, work.amax], [], sensitivity.search)
    rolls = stage("rollouts", [clean, result], [], rollouts.compare_generations)
    return [
        stage("clean", [], [clean], fp8_inputs.clean),
        stage("amax", [clean], [work.amax], amax.measure),
        *([rounds] if settings.rounding == "gptq" else []),
        *([search] if settings.target_cosine is not None else []),
        stage("quantize", [clean], [work.quantized], place_quantizers.place),
        stage("scales", [work.quantized, work.amax], [result], graph_proof.finish_graph),
        stage("shares", [clean, result], [], activation_ranges.shares),
        stage("parity", [clean, result], [], parity.require_parity),
        *([rolls] if settings.rollouts else []),
        stage("check rows", [result], [check_path(result)], write_check_rows),
    ]


def write_check_rows(work: Workspace) -> Mapping[str, Any]:
    """Write the check rows of the finished graph, beside it in the working folder."""
    return {"bytes": check_row_files.write_check_rows(work.result, "dit", "fp8").stat().st_size}


def report_path(artefact: Path) -> Path:
    """Where the report of an artefact lies."""
    return artefact.with_name(artefact.name + REPORT_SUFFIX)


def input_digests(source: Path, calibration: Path) -> dict[str, str]:
    """sha256 of everything the recipe reads, by file name."""
    return {file.name: files.sha256_of(file) for file in (*graph_io.files_of(source), calibration)}


class Fp8Recipe:
    """One build of `output`. `run` does it; everything before is checks that write nothing.

    What lies between the stages is in a hidden folder in `work` (default: beside the output), which is removed at the
    end unless `keep`. Raises ToolError for inputs that are not a FP16-mixed DiT or not a calibration set, or when the
    disk is too small; GateError when a proof or the parity gate fails.
    """

    def __init__(
        self, source: Path, calibration: Path, output: Path, settings: Settings, work: Path | None = None,
        keep: bool = False, same_as: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`same_as` names inserters whose result is as good: they make the same pairs and scales."""
        self.settings, self._keep = settings, keep
        self._also = [asdict(replace(settings, ptq=ptq)) for ptq in same_as]
        model = graph_io.load(source)
        contract.require_contract(model, "dit", source)
        fp8_inputs.require_half(model, source, settings.free_batch, settings.shaping)
        self.needs = fp8_inputs.needs_of(model, source, settings)
        rows = CalibrationSet.open(calibration)
        self._ranges = rows.check_values()
        if settings.rollouts:
            starts_of(rows)  # refused now and not after hours
        files.require_writable(output, "graph")
        self.work = ((work or output.parent) / f".{output.stem}.partial").resolve()
        files.require_writable(self.work / "stages.json", "--work-dir")
        self.inputs = input_digests(source, calibration)
        note = {"inputs": self.inputs, "settings": asdict(settings), "tools": manifest.tool_versions(manifest.TOOLS)}
        self._folder = WorkingFolder(self.work, note)
        self._space = Workspace(self.work, source, output, rows, settings)

    @property
    def plan(self) -> list[tuple[str, str]]:
        """Each stage and what it leaves."""
        return [
            (stage.name, ", ".join(str(path.relative_to(self.work)) for path in stage.leaves) or "the report")
            for stage in stages_of(self._space)
        ]

    @property
    def is_current(self) -> bool:
        """The artefact is there, whole, and of these inputs and settings."""
        known = (asdict(self.settings), *self._also)
        return any(manifest.is_current(self._space.output, self.inputs, one)[0] for one in known)

    def run(self, force: bool = False) -> dict[str, Any] | None:
        """Build; returns the report that lies beside the artefact, or None when the artefact is current."""
        settings = asdict(self.settings)
        with build(self._space.output, "dit_fp8", self.inputs, settings, force, also=self._also) as draft:
            if draft is None:
                return None
            requirements_check.require_disk(self.work, self.needs.disk)
            self._folder.open()
            self._space.done = self._folder.done
            for stage in stages_of(self._space):
                self._folder.run(stage)
            finished = self._finish(draft)
            if not self._keep:
                self._folder.remove()
        return finished

    def _finish(self, draft: Draft) -> dict[str, Any]:
        """Put the graph, the report and the manifest in place, in that order."""
        made, output, done = self._space.result, self._space.output, self._folder.done
        output.parent.mkdir(parents=True, exist_ok=True)
        if self._keep or made.stat().st_dev != output.parent.stat().st_dev:
            written = graph_io.save(graph_io.load(made), output)
        else:
            written = graph_io.move(made, output)
        written.append(check_row_files.place_check_rows(check_path(made), output))
        if "sensitivity" in done:
            written.append(pareto.plot(done["sensitivity"]["frontier"], output))
        report = {
            "format": REPORT_FORMAT,
            "artefact": output.name,
            "inputs": self.inputs,
            "outputs": {file.name: files.sha256_of(file) for file in written},
            "tools": self._folder.note["tools"],
            "settings": asdict(self.settings),
            "calibration": summary(self._space.calibration, self._ranges),
            "stages": done,
        }
        path = report_path(output)
        files.write_atomic_text(path, json.dumps(report, indent=2, sort_keys=True) + "\n")
        gates = {
            "proof": "holds",
            "worst denoised cosine": done["parity"]["worst"],
            "null row": done["clean"]["null row"],
        }
        draft.finish([*written, path], gates)
        return report
