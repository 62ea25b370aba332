"""FP8 recipe: ordered stages from an FP16-mixed DiT and a calibration set to dit_fp8.onnx, its proof and its report.

A linear layer y = x W of the trunk is computed on 8-bit codes:
    x ~ s_x * code_x (one scale per tensor),   W ~ s_W * code_W (one scale per output channel)
    y ~ (code_x @ code_W) * s_x * s_W
The codes are E4M3 floats (e4m3.py), so that the matrix units run at twice the fp16 rate and weights take half the
memory. s_W is known from the weights. s_x is a constant of the graph and comes from calibration: the amax of each
activation over recorded inputs of the DiT at every noise level (amax.py, scales.py). GPTQ chooses W's codes such that
rounding errors compensate each other (gptq.py). Norms, rotary angles, timestep features and the attention core keep 16
or 32 bits (selection.py, fp32_islands.py). In the graph all this is written as QuantizeLinear/DequantizeLinear pairs,
which TensorRT fuses into FP8 kernels.

The stages are: clean (canonical graph), amax, rounding (GPTQ), sensitivity (layers to keep in 16 bits for a target
cosine), quantize (insert Q/DQ), scales (set scales, store codes, prove), shares, parity, rollouts and check rows. Each
writes its result to a working folder beside the output; a killed run resumes at its unfinished stage. The finished
graph, the report and then the manifest are written only if every proof holds.
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
from sa3_build.quantization.settings import QuantizationSettings
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
REPORT_FORMAT = 2  # 2: snake_case keys


def stages_of(work: Workspace) -> list[Stage]:
    """Return the stages of one build in order: the files that each reads and writes, and its function."""

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
        stage("quantize", [clean], [work.quantized], place_quantizers.insert_pairs),
        stage("scales", [work.quantized, work.amax], [result], graph_proof.finish_graph),
        stage("shares", [clean, result], [], activation_ranges.shares),
        stage("parity", [clean, result], [], parity.require_parity),
        *([rolls] if settings.rollouts else []),
        stage("check_rows", [result], [check_path(result)], write_check_rows),
    ]


def write_check_rows(work: Workspace) -> Mapping[str, Any]:
    """Write the check rows of the finished graph, beside it in the working folder."""
    return {"bytes": check_row_files.write_check_rows(work.result, "dit", "fp8").stat().st_size}


def report_path(artefact: Path) -> Path:
    """Return the path of an artefact's report."""
    return artefact.with_name(artefact.name + REPORT_SUFFIX)


def input_digests(source: Path, calibration: Path) -> dict[str, str]:
    """Return the sha256 of every file that the recipe reads, by file name."""
    return {file.name: files.sha256_of(file) for file in (*graph_io.files_of(source), calibration)}


class Fp8Recipe:
    """One build of `output`. The constructor checks and writes nothing; `run` builds.

    Intermediate files are in a hidden folder in `work` (default: beside the output), which is removed at the end unless
    `keep`. Raises ToolError for inputs that are not an FP16-mixed DiT or not a calibration set, or when the disk is too
    small; GateError when a proof or the parity check fails.
    """

    def __init__(
        self, source: Path, calibration: Path, output: Path, settings: QuantizationSettings, work: Path | None = None,
        keep: bool = False, same_as: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Check the inputs; `same_as` names inserters whose result is equivalent: same pairs and scales."""
        self.settings, self._keep = settings, keep
        self._also = [asdict(replace(settings, ptq=ptq)) for ptq in same_as]
        model = graph_io.load(source)
        contract.require_contract(model, "dit", source)
        fp8_inputs.require_fp16_mixed(model, source, settings.free_batch, settings.shaping)
        self.needs = fp8_inputs.needs_of(model, source, settings)
        rows = CalibrationSet.open(calibration)
        self._ranges = rows.check_values()
        if settings.rollouts:
            starts_of(rows)  # raises now instead of after hours
        files.require_writable(output, "graph")
        self.work = ((work or output.parent) / f".{output.stem}.partial").resolve()
        files.require_writable(self.work / "stages.json", "--work-dir")
        self.inputs = input_digests(source, calibration)
        note = {
            "format": REPORT_FORMAT, "inputs": self.inputs, "settings": asdict(settings),
            "tools": manifest.tool_versions(manifest.TOOLS),
        }  # fmt: skip
        self._folder = WorkingFolder(self.work, note)
        self._space = Workspace(self.work, source, output, rows, settings)

    @property
    def plan(self) -> list[tuple[str, str]]:
        """Each stage and the files that it writes."""
        return [
            (stage.name, ", ".join(str(path.relative_to(self.work)) for path in stage.leaves) or "the report")
            for stage in stages_of(self._space)
        ]

    @property
    def is_current(self) -> bool:
        """True if the artefact is complete and was made from these inputs and settings."""
        accepted = (asdict(self.settings), *self._also)
        return any(manifest.is_current(self._space.output, self.inputs, candidate)[0] for candidate in accepted)

    def run(self, force: bool = False) -> dict[str, Any] | None:
        """Run the stages; return the report that is stored beside the artefact, or None if the artefact is current."""
        settings = asdict(self.settings)
        with build(self._space.output, "dit_fp8", self.inputs, settings, force, also=self._also) as draft:
            if draft is None:
                return None
            requirements_check.require_disk(self.work, self.needs.disk)
            self._folder.open()
            self._space.done = self._folder.done
            for stage in stages_of(self._space):
                self._folder.run(stage)
            report = self._finish(draft)
            if not self._keep:
                self._folder.remove()
        return report

    def _finish(self, draft: Draft) -> dict[str, Any]:
        """Move the graph, the report and the manifest into place, in that order."""
        result_path, output, done = self._space.result, self._space.output, self._folder.done
        output.parent.mkdir(parents=True, exist_ok=True)
        if self._keep or result_path.stat().st_dev != output.parent.stat().st_dev:
            written = graph_io.save(graph_io.load(result_path), output)
        else:
            written = graph_io.move(result_path, output)
        written.append(check_row_files.place_check_rows(check_path(result_path), output))
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
            "worst_denoised_cosine": done["parity"]["worst"],
            "null_row": done["clean"]["null_row"],
        }
        draft.finish([*written, path], gates)
        return report
