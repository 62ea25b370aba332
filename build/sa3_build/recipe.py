"""The FP8 recipe: ordered stages from a FP16-mixed DiT and a calibration set to dit_fp8.onnx, its proof and its report.

Each stage leaves its result in a working folder beside the output; a killed run goes on at the stage it was in. The
finished graph, the report and then the manifest appear only when every proof holds.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build import adoption, compare, frontier, graph, modelopt_ptq, proof, ptq, published_recipe, sensitivity
from sa3_build.accepted import require_half
from sa3_build.calib import CalibrationSet, ChosenRows, summary
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.clean import FoldWeights, RenameNodes
from sa3_build.passes.fp8_weights import StoreWeightsAsFp8
from sa3_build.passes.insert_qdq import InsertQuantizers
from sa3_build.passes.islands import find_dit_islands
from sa3_build.settings import Settings
from sa3_trt_core import console, files, manifest
from sa3_trt_core.errors import GateError

REPORT_SUFFIX = ".report.json"
REPORT_FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One step: what it needs, what it leaves in the working folder, and how it is done."""

    name: str
    needs: tuple[str, ...]
    leaves: tuple[str, ...]
    run: Callable[[], Mapping[str, Any]]


def report_path(artefact: Path) -> Path:
    """Where the report of an artefact lies."""
    return artefact.with_name(artefact.name + REPORT_SUFFIX)


def input_digests(source: Path, calibration: Path) -> dict[str, str]:
    """sha256 of everything the recipe reads, by file name."""
    return {file.name: files.sha256_of(file) for file in (*graph.files_of(source), calibration)}


class Fp8Recipe:
    """One build of `output`. `run` does it; everything before is checks that write nothing.

    Raises ToolError for inputs that are not a FP16-mixed DiT or not a calibration set, GateError when a proof or the
    parity gate says no.
    """

    def __init__(self, source: Path, calibration: Path, output: Path, settings: Settings) -> None:
        self._source, self._output, self._settings = source, output, settings
        model = graph.load(source)
        graph.require_contract(model, "dit", source)
        require_half(model, source, settings.free_batch)
        self._calibration = CalibrationSet.open(calibration)
        self._ranges = self._calibration.check_values()
        files.require_writable(output, "graph")
        self._work = output.with_name(f".{output.stem}.partial").resolve()
        self._inputs = input_digests(source, calibration)
        self._stages_done: dict[str, Any] = {}

    @property
    def inputs(self) -> dict[str, str]:
        """sha256 by file name."""
        return self._inputs

    def run(self) -> dict[str, Any]:
        """Build; returns the report that lies beside the artefact."""
        self._open_work()
        for stage in self._stages():
            self._run_stage(stage)
        finished = self._finish()
        shutil.rmtree(self._work, ignore_errors=True)
        return finished

    def _stages(self) -> tuple[Stage, ...]:
        search = Stage("sensitivity", ("clean.onnx", "amax.npy"), (), self._search)
        return (
            Stage("clean", (), ("clean.onnx",), self._clean),
            Stage("amax", ("clean.onnx",), ("amax.npy",), self._amax),
            *([search] if self._settings.target_cosine is not None else []),
            Stage("quantize", ("clean.onnx",), ("quantized.onnx",), self._quantize),
            Stage("scales", ("quantized.onnx", "amax.npy"), ("dit_fp8.onnx",), self._scales),
            Stage("parity", ("clean.onnx", "dit_fp8.onnx"), (), self._parity),
        )

    def _open_work(self) -> None:
        """Keep a working folder that was made for these inputs and settings; throw away any other."""
        note = {
            "inputs": self._inputs,
            "settings": self._settings.noted(),
            "tools": manifest.tool_versions(manifest.TOOLS),
        }
        try:
            saved = json.loads((self._work / "stages.json").read_text())
        except (OSError, ValueError):
            saved = {}
        if saved.get("note") == note:
            self._stages_done = saved["done"]
        else:
            shutil.rmtree(self._work, ignore_errors=True)
            self._work.mkdir(parents=True)
        self._note = note

    def _run_stage(self, stage: Stage) -> None:
        if stage.name in self._stages_done and all((self._work / name).exists() for name in stage.leaves):
            return
        for name in stage.needs:
            assert (self._work / name).exists(), f"stage {stage.name} needs {name}"
        started = time.monotonic()
        done = dict(stage.run())
        done["seconds"] = round(time.monotonic() - started, 2)
        self._stages_done[stage.name] = done
        note = {"note": self._note, "done": self._stages_done}
        files.write_atomic_text(self._work / "stages.json", json.dumps(note))

    def _clean(self) -> Mapping[str, Any]:
        model = graph.load(self._source)
        adopted = adoption.adopt(model, self._settings.free_batch)
        remixed = adoption.remix(model)
        results = [*adopted.results, *remixed, *run_passes(model, [FoldWeights(), RenameNodes()])]
        find_dit_islands(model)
        graph.drop_exporter_notes(model)
        graph.save(model, self._work / "clean.onnx")
        found: dict[str, Any] = {"passes": [_result(result) for result in results]}
        if remixed:
            found["cosine with the source as it was mixed"] = adoption.require_same_network(
                self._source, self._work / "clean.onnx"
            )
        if adopted.freed:
            found["rows together against one by one"] = adoption.require_rows_alike(self._work / "clean.onnx")
        return found

    def _candidates(self, model: ir.Model | None = None) -> ptq.Selection:
        chosen_by = published_recipe if self._settings.recipe == "reference" else ptq
        return chosen_by.select_products(model or graph.load(self._work / "clean.onnx"))

    def _selection(self, model: ir.Model | None = None) -> ptq.Selection:
        kept = self._stages_done["sensitivity"]["kept"] if self._settings.target_cosine is not None else ()
        return ptq.keep(self._candidates(model), kept)

    def _rows(self) -> CalibrationSet | ChosenRows:
        whole = self._calibration
        return published_recipe.rows_of(whole) if self._settings.recipe == "reference" else whole

    def _search(self) -> Mapping[str, Any]:
        return sensitivity.search(
            self._work / "clean.onnx",
            np.load(self._work / "amax.npy"),
            compare.parity_rows_of(self._calibration, self._settings.parity_rows),
            self._settings,
        )

    def _quantize(self) -> Mapping[str, Any]:
        selection = self._selection()
        if self._settings.ptq == "modelopt":
            self._modelopt(selection)
        else:
            model = graph.load(self._work / "clean.onnx")
            axes = {product.node: product.channel_axis for product in selection.quantized}
            run_passes(model, [InsertQuantizers(axes)])
            graph.save(model, self._work / "quantized.onnx")
        return {"quantised products": len(selection.quantized), "fp8 share of token products": selection.fp8_share}

    def _modelopt(self, selection: ptq.Selection) -> None:
        scratch = modelopt_ptq.scratch_folder(self._work)
        private = scratch / "source.onnx"
        graph.save(graph.load(self._work / "clean.onnx"), private)
        modelopt_ptq.quantize_fp8(private, scratch / "quantized.onnx", selection, self._calibration)
        model = graph.load(scratch / "quantized.onnx")
        graph.drop_exporter_notes(model)
        model.graph.sort()
        graph.save(model, self._work / "quantized.onnx")
        shutil.rmtree(scratch)

    def _amax(self) -> Mapping[str, Any]:
        amax = ptq.measure_amax(self._work / "clean.onnx", self._candidates(), self._rows())
        with files.atomic_path(self._work / "amax.npy") as temporary:
            np.save(temporary, amax)
        return {"rows": len(amax), "amax": self._amax_by_sigma(amax)}

    def _amax_by_sigma(self, amax: np.ndarray) -> list[dict[str, Any]]:
        selection = self._candidates()
        sigmas = np.round(self._rows().sigmas(), 6)
        users: dict[str, list[str]] = {}
        for product in selection.quantized:
            users.setdefault(product.activation, []).append(product.node)
        return [
            {
                "activation": name,
                "products": users[name],
                "amax": float(amax[:, column].max()),
                "by sigma": {
                    f"{s:g}": float(amax[sigmas == s, column].max()) for s in sorted(set(sigmas), reverse=True)
                },
            }
            for column, name in enumerate(selection.activations)
        ]

    def _scales(self) -> Mapping[str, Any]:
        source, result = graph.load(self._work / "clean.onnx"), graph.load(self._work / "quantized.onnx")
        selection = self._selection(source)
        amax = np.load(self._work / "amax.npy")[:, ptq.columns(self._candidates(source), selection)]
        if self._settings.recipe == "reference":
            amax = published_recipe.bounded(amax)
        check = self._settings.ptq == "modelopt"
        counts = ptq.apply_scales(result, selection, amax, self._settings.headroom, check)
        if self._settings.weights == "fp8":
            counts = {**counts, **run_passes(result, [StoreWeightsAsFp8()])[0].counts}
        checks = proof.prove(source, result, selection)
        failures = proof.failures_of(checks)
        if failures:
            raise GateError(
                f"the proof of {self._output.name} failed ({len(failures)} contradictions); nothing was written",
                f"the intermediate graphs lie in {self._work}; report this with the lines below",
                "\n".join(failures),
            )
        graph.save(result, self._work / "dit_fp8.onnx")
        claims = [{"claim": check.claim, "looked at": check.looked_at, "holds": check.holds} for check in checks]
        return {**counts, "proof": claims, "excluded": selection.excluded}

    def _parity(self) -> Mapping[str, Any]:
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        rows = compare.parity_rows_of(self._calibration, self._settings.parity_rows)
        sides = []
        with console.Progress("parity with the source graph", 2 * rows.rows) as progress:
            # The clean graph, not the source: what a source of another recipe has wrong is put right in it.
            for path in (self._work / "clean.onnx", self._work / "dit_fp8.onnx"):
                with OnnxRuntimeEngine(path) as engine:
                    sides.append(compare.denoise_rows(engine, _counted(rows, progress)))
        parity = compare.parity_by_sigma(*sides)
        worst = min(p.worst_cosine for p in parity)
        wanted = max(self._settings.min_cosine, self._settings.target_cosine or 0.0)
        if not worst >= wanted:
            raise GateError(
                f"worst denoised cosine {worst:.6f} is under {wanted:g}; nothing was written",
                "calibrate on more prompts, or lower --min-cosine if you know why",
                console.table(compare.PARITY_HEADER, compare.parity_rows(parity)),
            )
        return {"parity": [asdict(p) for p in parity], "worst": worst}

    def _finish(self) -> dict[str, Any]:
        """Put the graph, the report and the manifest in place, in that order."""
        written = graph.save(graph.load(self._work / "dit_fp8.onnx"), self._output)
        if "sensitivity" in self._stages_done:
            written.append(frontier.plot(self._stages_done["sensitivity"]["frontier"], self._output))
        report = {
            "format": REPORT_FORMAT,
            "artefact": self._output.name,
            "inputs": self._inputs,
            "outputs": {file.name: files.sha256_of(file) for file in written},
            "tools": self._note["tools"],
            "settings": self._settings.noted(),
            "calibration": summary(self._calibration, self._ranges),
            "stages": self._stages_done,
        }
        path = report_path(self._output)
        files.write_atomic_text(path, json.dumps(report, indent=2, sort_keys=True) + "\n")
        gates = {"proof": "holds", "worst denoised cosine": self._stages_done["parity"]["worst"]}
        manifest.write_manifest(self._output, "dit_fp8", [*written, path], self._inputs, self._settings.noted(), gates)
        return report


def _counted(rows: Any, progress: console.Progress) -> Any:
    for row in rows:
        yield row
        progress.advance()


def _result(result: PassResult) -> dict[str, Any]:
    return {"name": result.name, **result.counts, **({"notes": list(result.notes)} if result.notes else {})}
