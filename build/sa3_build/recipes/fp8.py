"""The FP8 recipe: ordered stages from a FP16-mixed DiT and a calibration set to dit_fp8.onnx, its proof and its report.

Each stage leaves its result in a working folder beside the output; a killed run goes on at the stage it was in. The
finished graph, the report and then the manifest appear only when every proof holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sa3_build.e4m3 import Codes
from sa3_build.graph import contract, io as graph_io
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes import canonicalize
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.insert_qdq import InsertQuantizers
from sa3_build.passes.null_row import has_null_row
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.passes.store_fp8_weights import StoreWeightsAsFp8
from sa3_build.quantization import (
    activation_ranges,
    amax as quantization_amax,
    modelopt,
    pareto,
    reference_recipe,
    round_weights,
    scales as quantization_scales,
    selection as quantization_selection,
    sensitivity,
)
from sa3_build.recipes import requirements_check
from sa3_build.recipes.fp8_inputs import needs_of, require_half
from sa3_build.recipes.fp8_settings import Settings
from sa3_build.recipes.stages import Stage, WorkingFolder
from sa3_build.verification import graph_checks, graph_proof, parity as verification_parity, rollouts
from sa3_trt_core import console
from sa3_trt_core.artifacts import files, locks, manifest
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, ChosenRows, summary
from sa3_trt_core.errors import GateError

REPORT_SUFFIX = ".report.json"
REPORT_FORMAT = 1


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
    disk is too small; GateError when a proof or the parity gate says no.
    """

    def __init__(
        self, source: Path, calibration: Path, output: Path, settings: Settings, work: Path | None = None,
        keep: bool = False,
    ) -> None:  # fmt: skip
        self._source, self._output, self.settings, self._keep = source, output, settings, keep
        model = graph_io.load(source)
        contract.require_contract(model, "dit", source)
        require_half(model, source, settings.free_batch, settings.shaping)
        self.needs = needs_of(model, source, settings)
        self._calibration = CalibrationSet.open(calibration)
        self._ranges = self._calibration.check_values()
        if settings.rollouts:
            rollouts.starts_of(self._calibration)  # refused now and not after hours
        files.require_writable(output, "graph")
        self.work = ((work or output.parent) / f".{output.stem}.partial").resolve()
        files.require_writable(self.work / "stages.json", "--work-dir")
        self.inputs = input_digests(source, calibration)
        note = {"inputs": self.inputs, "settings": settings.noted(), "tools": manifest.tool_versions(manifest.TOOLS)}
        self._folder = WorkingFolder(self.work, note)
        self._made = Path("result") / output.name

    @property
    def plan(self) -> list[tuple[str, str]]:
        """Each stage and what it leaves."""
        return [(stage.name, ", ".join(stage.leaves) or "the report") for stage in self._stages()]

    def run(self) -> dict[str, Any]:
        """Build; returns the report that lies beside the artefact."""
        requirements_check.require_disk(self.work, self.needs.disk)
        with locks.held(locks.lock_path(self._output), f"the build of {self._output}"):
            self._folder.open()
            for stage in self._stages():
                self._folder.run(stage)
            finished = self._finish()
            if not self._keep:
                self._folder.remove()
        return finished

    def _stages(self) -> tuple[Stage, ...]:
        made = str(self._made)
        rounds = Stage("rounding", ("clean.onnx",), (round_weights.FOLDER,), self._round)
        rolls = Stage("rollouts", ("clean.onnx", made), (), self._rollouts)
        search = Stage("sensitivity", ("clean.onnx", "amax.npy"), (), self._search)
        return (
            Stage("clean", (), ("clean.onnx",), self._clean),
            Stage("amax", ("clean.onnx",), ("amax.npy",), self._amax),
            *([rounds] if self.settings.rounding == "gptq" else []),
            *([search] if self.settings.target_cosine is not None else []),
            Stage("quantize", ("clean.onnx",), ("quantized.onnx",), self._quantize),
            Stage("scales", ("quantized.onnx", "amax.npy"), (made,), self._scales),
            Stage("shares", ("clean.onnx", made), (), self._shares),
            Stage("parity", ("clean.onnx", made), (), self._parity),
            *([rolls] if self.settings.rollouts else []),
        )

    def _clean(self) -> Mapping[str, Any]:
        model = graph_io.load(self._source)
        adopted = canonicalize.adopt(model, self.settings.free_batch)
        remixed = canonicalize.remix(model, self.settings.shaping)
        results = [*adopted.results, *remixed, *run_passes(model, [FoldWeights(), RenameNodes()])]
        find_dit_islands(model)
        graph_io.drop_exporter_notes(model)
        graph_io.save_linked(model, self.work / "clean.onnx")
        found: dict[str, Any] = {"passes": [result.as_dict for result in results]}
        if remixed:
            found["cosine with the source as it was mixed"] = graph_checks.require_same_network(
                self._source, self.work / "clean.onnx"
            )
        found["null row"] = has_null_row(model)
        if adopted.foreign and self.settings.free_batch:
            found["rows together against one by one"] = graph_checks.require_rows_alike(self.work / "clean.onnx")
        return found

    @cached_property
    def _candidates(self) -> quantization_selection.Selection:
        chosen_by = reference_recipe if self.settings.recipe == "reference" else quantization_selection
        return chosen_by.select_products(graph_io.load(self.work / "clean.onnx"))

    @cached_property
    def _selection(self) -> quantization_selection.Selection:
        kept = self._folder.done["sensitivity"]["kept"] if self.settings.target_cosine is not None else ()
        return quantization_selection.keep(self._candidates, kept)

    @cached_property
    def _rows(self) -> CalibrationSet | ChosenRows:
        whole = self._calibration
        return reference_recipe.rows_of(whole) if self.settings.recipe == "reference" else whole

    @cached_property
    def _parity_rows(self) -> ChosenRows:
        return verification_parity.parity_rows_of(self._calibration, self.settings.parity_rows)

    def _search(self) -> Mapping[str, Any]:
        amax = np.load(self.work / "amax.npy")
        settings = self.settings
        assert settings.target_cosine is not None
        return sensitivity.search(
            self.work / "clean.onnx", amax, self._parity_rows, self._codes, target=settings.target_cosine,
            headroom=settings.headroom, max_fp16_products=settings.max_fp16_products, weights=settings.weights,
        )  # fmt: skip

    def _round(self) -> Mapping[str, Any]:
        rows = round_weights.rows_of(self._calibration, self._parity_rows)
        found = round_weights.round_weights(self.work / "clean.onnx", self._candidates, rows, self.work)
        return {**found, "rows also in the parity": len(rows.indices & self._parity_rows.indices)}

    @property
    def _codes(self) -> Mapping[str, Codes]:
        return round_weights.stored_codes(self._candidates, self.work) if self.settings.rounding == "gptq" else {}

    def _quantize(self) -> Mapping[str, Any]:
        selection = self._selection
        if self.settings.ptq == "modelopt":
            self._modelopt(selection)
        else:
            model = graph_io.load(self.work / "clean.onnx")
            axes = {product.node: product.channel_axis for product in selection.quantized}
            run_passes(model, [InsertQuantizers(axes)])
            graph_io.save_linked(model, self.work / "quantized.onnx")
        return {"quantised products": len(selection.quantized), "fp8 share of token products": selection.fp8_share}

    def _modelopt(self, selection: quantization_selection.Selection) -> None:
        scratch = modelopt.scratch_folder(self.work)
        private = scratch / "source.onnx"
        graph_io.save(graph_io.load(self.work / "clean.onnx"), private)
        modelopt.quantize_fp8(private, scratch / "quantized.onnx", selection, self._calibration)
        model = graph_io.load(scratch / "quantized.onnx")
        graph_io.drop_exporter_notes(model)
        model.graph.sort()
        graph_io.save(model, self.work / "quantized.onnx")
        shutil.rmtree(scratch)

    def _amax(self) -> Mapping[str, Any]:
        amax = quantization_amax.measure_amax(self.work / "clean.onnx", self._candidates, self._rows)
        with files.atomic_path(self.work / "amax.npy") as temporary:
            np.save(temporary, amax)
        return {"rows": len(amax), "amax": activation_ranges.amax_table(amax, self._candidates, self._rows)}

    def _scales(self) -> Mapping[str, Any]:
        source, result = graph_io.load(self.work / "clean.onnx"), graph_io.load(self.work / "quantized.onnx")
        selection = self._selection
        amax = np.load(self.work / "amax.npy")[:, quantization_selection.columns(self._candidates, selection)]
        if self.settings.recipe == "reference":
            amax = reference_recipe.bounded(amax)
        check = self.settings.ptq == "modelopt"
        counts = quantization_scales.apply_scales(result, selection, amax, self.settings.headroom, check)
        if self.settings.weights == "fp8":
            counts = {**counts, **run_passes(result, [StoreWeightsAsFp8(self._codes)])[0].counts}
        checks = graph_proof.prove(source, result, selection, self._codes)
        failures = graph_proof.failures_of(checks)
        if failures:
            raise GateError(
                f"the proof of {self._output.name} failed ({len(failures)} contradictions); nothing was written",
                f"the intermediate graphs lie in {self.work}; report this with the lines below",
                "\n".join(failures),
            )
        graph_io.save(result, self.work / self._made)
        claims = [{"claim": check.claim, "looked at": check.looked_at, "holds": check.holds} for check in checks]
        return {**counts, "proof": claims, "excluded": selection.excluded}

    def _shares(self) -> Mapping[str, Any]:
        """On the rows of the parity, which hold every kind and sigma: a run of every row would double the time."""
        rows = self._parity_rows
        scales = activation_ranges.scales_of(self.work / self._made, self._selection)
        found = activation_ranges.measure_shares(self.work / "clean.onnx", scales, rows)
        return {"rows": rows.rows, "worst": activation_ranges.worst_shares(found), "shares": found}

    def _parity(self) -> Mapping[str, Any]:
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        rows = self._parity_rows
        sides = []
        with console.Progress("parity with the source graph", 2 * rows.rows) as progress:
            # The clean graph, not the source: what a source of another recipe has wrong is put right in it.
            for path in (self.work / "clean.onnx", self.work / self._made):
                with OnnxRuntimeEngine(path, low_memory=True) as engine:
                    sides.append(verification_parity.denoise_rows(engine, _counted(rows, progress)))
        parity = verification_parity.parity_by_sigma(*sides)
        worst = min(p.worst_cosine for p in parity)
        wanted = max(self.settings.min_cosine, self.settings.target_cosine or 0.0)
        if not worst >= wanted:
            raise GateError(
                f"worst denoised cosine {worst:.6f} is under {wanted:g}; nothing was written",
                "calibrate on more prompts, or lower the limit if you know why (--min-cosine, --target-cosine)",
                console.table(verification_parity.PARITY_HEADER, verification_parity.parity_rows(parity)),
            )
        kinds = verification_parity.parity_by_kind(sides[0], sides[1], rows.kinds())
        return {"parity": [asdict(p) for p in parity], "by kind": [asdict(p) for p in kinds], "worst": worst}

    def _rollouts(self) -> Mapping[str, Any]:
        """Whole generations of both graphs on shared noise, beside the reference with its input off by known sizes."""
        starts = rollouts.varied_starts(self._calibration, self.settings.rollouts)
        study = rollouts.DriftStudy(self._calibration, starts, None, low_memory=True)
        controls, found = study.run(self.work / "clean.onnx", [self.work / self._made])
        kinds = self._calibration.kinds()
        return {"kinds": [kinds[start] for start in starts], **rollouts.document(controls, found, rollouts.EVERY_STEP)}

    def _finish(self) -> dict[str, Any]:
        """Put the graph, the report and the manifest in place, in that order."""
        made = self.work / self._made
        self._output.parent.mkdir(parents=True, exist_ok=True)
        if self._keep or made.stat().st_dev != self._output.parent.stat().st_dev:
            written = graph_io.save(graph_io.load(made), self._output)
        else:
            written = graph_io.move(made, self._output)
        if "sensitivity" in self._folder.done:
            written.append(pareto.plot(self._folder.done["sensitivity"]["frontier"], self._output))
        report = {
            "format": REPORT_FORMAT,
            "artefact": self._output.name,
            "inputs": self.inputs,
            "outputs": {file.name: files.sha256_of(file) for file in written},
            "tools": self._folder.note["tools"],
            "settings": self.settings.noted(),
            "calibration": summary(self._calibration, self._ranges),
            "stages": self._folder.done,
        }
        path = report_path(self._output)
        files.write_atomic_text(path, json.dumps(report, indent=2, sort_keys=True) + "\n")
        gates = {"proof": "holds", "worst denoised cosine": self._folder.done["parity"]["worst"]}
        gates["null row"] = self._folder.done["clean"]["null row"]
        manifest.write_manifest(self._output, "dit_fp8", [*written, path], self.inputs, self.settings.noted(), gates)
        return report


def _counted(rows: Any, progress: console.Progress) -> Any:
    for row in rows:
        yield row
        progress.advance()
