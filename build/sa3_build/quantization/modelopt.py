"""ModelOpt's FP8 PTQ, restricted to inserting Q/DQ pairs. This is the only module that imports ModelOpt."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sa3_build.quantization.selection import Selection
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.console import Progress


def scratch_folder(work: Path) -> Path:
    """Return an empty folder for ModelOpt: in the working folder, else in the system's temporary folder.

    ModelOpt derives file names by replacing ".onnx" everywhere in a path, so no parent folder may contain it.
    """
    scratch = work / "modelopt"
    if ".onnx" in str(scratch):
        return Path(tempfile.mkdtemp(prefix="sa3-modelopt-"))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return scratch


def quantize_fp8(source: Path, output: Path, selection: Selection, calibration: CalibrationSet) -> None:
    """Run ModelOpt's FP8 PTQ with `max` calibration over every row; `source` is modified and must be a private copy.

    `output` must be absolute and must not exist, nor its `_data`: ModelOpt appends to existing files. `fp32` as high
    precision type preserves the fp32 islands, which the default would lower.
    """
    from modelopt.onnx.quantization import quantize

    assert output.is_absolute() and not output.exists()
    with _quiet_modelopt():
        quantize(
            onnx_path=str(source),
            output_path=str(output),
            quantize_mode="fp8",
            calibration_method="max",
            calibration_eps=["cpu"],
            calibration_data_reader=_RowReader(calibration),
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=sorted(selection.excluded),
            disable_mha_qdq=True,
            high_precision_dtype="fp32",
            enable_shared_constants_duplication=False,
            use_external_data_format=True,
            log_level="ERROR",
        )


class _RowReader:
    """Calibration reader with ModelOpt's interface: rows one at a time, rewind, and the first row."""

    def __init__(self, calibration: CalibrationSet) -> None:
        self._calibration = calibration
        self.rewind()

    def rewind(self) -> None:
        self._rows = iter(self._calibration)
        self._progress = Progress("ModelOpt max calibration", self._calibration.rows)

    def get_first(self) -> dict[str, np.ndarray]:
        return next(iter(self._calibration))

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self._rows, None)
        if row is not None:
            self._progress.advance()
        return row


@contextlib.contextmanager
def _quiet_modelopt() -> Iterator[None]:
    """Suppress what ModelOpt and its dependencies print on stdout and below level error; exceptions pass."""
    before = os.environ.get("POLYGRAPHY_LOG_VERBOSITY")
    os.environ["POLYGRAPHY_LOG_VERBOSITY"] = "error"
    root = logging.getLogger("modelopt")
    level = root.level
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
        if before is None:
            os.environ.pop("POLYGRAPHY_LOG_VERBOSITY", None)
        else:
            os.environ["POLYGRAPHY_LOG_VERBOSITY"] = before
