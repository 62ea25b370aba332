"""Inputs, settings and intermediate files of one FP8 build: what every stage of the recipe reads and writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sa3_build.graph import io as graph_io
from sa3_build.quantization import reference_recipe, selection as quantization_selection
from sa3_build.quantization.settings import Settings
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative


@dataclass
class Workspace:
    """One build of `output` from `source` and `calibration`, and the files between its stages, in `folder`.

    `clean` is the source sorted, folded and named; `amax` (R, A) that of every candidate's activation in every row;
    `codes` the folder of the E4M3 codes that GPTQ chose, a file a weight; `quantized` the clean graph with Q/DQ pairs,
    scales not yet set; `result` the finished graph until it moves to `output`, its sidecar already named like that.
    `done` holds the results of the finished stages, by name.
    """

    folder: Path
    source: Path
    output: Path
    calibration: CalibrationSet
    settings: Settings
    done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clean, self.amax, self.codes, self.quantized, self.result = (
            self.folder / name
            for name in ("clean.onnx", "amax.npy", "rounding", "quantized.onnx", f"result/{self.output.name}")
        )

    @cached_property
    def candidates(self) -> quantization_selection.Selection:
        """The products that can be quantised."""
        chosen_by = reference_recipe if self.settings.recipe == "reference" else quantization_selection
        return chosen_by.select_products(graph_io.load(self.clean))

    @cached_property
    def selection(self) -> quantization_selection.Selection:
        """The products that are quantised: the candidates without those that the search keeps in 16 bits."""
        kept = self.done["sensitivity"]["kept"] if self.settings.target_cosine is not None else ()
        return quantization_selection.keep(self.candidates, kept)

    @cached_property
    def rows(self) -> CalibrationSet:
        """The rows that scales are measured on."""
        whole = self.calibration
        return reference_recipe.rows_of(whole) if self.settings.recipe == "reference" else whole

    @cached_property
    def parity_rows(self) -> CalibrationSet:
        """The rows that source and result are compared on."""
        return representative(self.calibration, self.settings.parity_rows)
