"""Inputs, settings and intermediate files of one FP8 build, shared by the stages of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sa3_build.graph import io as graph_io
from sa3_build.quantization import reference_recipe, selection as quantization_selection
from sa3_build.quantization.settings import QuantizationSettings
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative


@dataclass
class Workspace:
    """One build of `output` from `source` and `calibration`, with the intermediate files in `folder`.

    `clean`: the source sorted, folded and named. `amax`: (R, A) of every candidate's activation in every row. `codes`:
    the folder of E4M3 codes chosen by GPTQ, one file per weight. `quantized`: the clean graph with Q/DQ pairs whose
    scales are not final. `result`: the finished graph until it is moved to `output`; its sidecar already has the final
    name. `done`: the results of finished stages, by name.
    """

    folder: Path
    source: Path
    output: Path
    calibration: CalibrationSet
    settings: QuantizationSettings
    done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clean, self.amax, self.codes, self.quantized, self.result = (
            self.folder / name
            for name in ("clean.onnx", "amax.npy", "rounding", "quantized.onnx", f"result/{self.output.name}")
        )

    @cached_property
    def candidates(self) -> quantization_selection.Selection:
        """The linear layers that can be quantised."""
        chosen_by = reference_recipe if self.settings.recipe == "reference" else quantization_selection
        return chosen_by.select_linears(graph_io.load(self.clean))

    @cached_property
    def selection(self) -> quantization_selection.Selection:
        """The layers that are quantised: the candidates without those that the search keeps in 16 bits."""
        kept = self.done["sensitivity"]["kept"] if self.settings.target_cosine is not None else ()
        return quantization_selection.keep(self.candidates, kept)

    @cached_property
    def rows(self) -> CalibrationSet:
        """The calibration rows that scales are measured on."""
        calibration = self.calibration
        return reference_recipe.rows_of(calibration) if self.settings.recipe == "reference" else calibration

    @cached_property
    def parity_rows(self) -> CalibrationSet:
        """The calibration rows on which source and result are compared."""
        return representative(self.calibration, self.settings.parity_rows)
