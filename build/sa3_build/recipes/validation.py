"""Compare a DiT that a command has just made with its reference: figures on stderr, a report in a folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sa3_trt_core import engines, targets
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource

PROMPTS = 8
Validate = Callable[[list[str]], int]  # scripts/validate_fp8.py, handed in by the command


def validate_graph(validate: Validate, reference: Path, candidate: Path, calibration: Path) -> Path:
    """Compare two ONNX graphs on a calibration set's starts and rows; returns the folder, beside the candidate.

    With its decoder under the same root the sound is compared too, and there is a page to listen to. Raises GateError.
    """
    out = candidate.with_name(f"{candidate.name}.validation")
    root = candidate.resolve().parent.parent
    dit = str(targets.publishable_at(candidate).dit)
    audible = resolve.local_onnx(root, targets.decoder_for(dit, "fp16mixed")) is not None
    line = ["--reference", str(reference), "--candidate", str(candidate), "--backend", engines.DIRECT.name]
    line += ["--calib", str(calibration), "--prompts", str(PROMPTS), "--out", str(out)]
    _run(validate, [*line, *(["--onnx-root", str(root), "--html"] if audible else ["--no-audio"])])
    return out


def require_dits(chosen: Sequence[targets.Target]) -> list[targets.Target]:
    """The DiTs among targets. Raises ToolError when there is none to validate."""
    found = [target for target in chosen if target.kind == "dit"]
    if not found:
        raise ToolError("--validate is for DiTs, and none is named", "name one, for example sa3-m-fp8")
    return found


def validate_target(
    validate: Validate, target: targets.Target, backend: str, arches: Sequence[str], source: ModelSource
) -> Path:
    """Compare a DiT that was compiled with the FP16-mixed one (that one with fp32); returns the report's folder.

    The engine is run where this machine's GPU is one of `arches`, the reference's too where it is built; else ONNX
    Runtime runs the ONNX that it was compiled from. Raises ToolError and GateError.
    """
    record = engines.BACKENDS[backend]
    here = record.arch_here()
    built = here in arches
    if not built:
        print(f"no GPU here runs {target.name} for {', '.join(arches)}: its ONNX is validated", file=sys.stderr)
    dit = str(target.dit)
    reference = "fp32" if target.precision == "fp16mixed" else "fp16mixed"
    other = targets.dit_target(dit, reference)
    both = built and record.engine_path(source.models_dir, str(here), other).is_file()
    out = source.models_dir / "validation" / target.name
    line = ["--dit", dit, "--reference", reference, "--candidate", target.precision]
    line += ["--models-dir", str(source.models_dir), "--out", str(out), "--html"]
    line += ["--reference-backend", backend if both else engines.DIRECT.name]
    line += ["--candidate-backend", backend if built else engines.DIRECT.name]
    line += ["--backend", engines.AUTO if built else engines.DIRECT.name]
    _run(validate, [*line, *(["--onnx-root", str(source.onnx_root)] if source.onnx_root is not None else [])])
    return out


def _run(validate: Validate, line: list[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the command's own
        validate(line)
