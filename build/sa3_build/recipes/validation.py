"""Compare a newly built DiT with its reference: figures on stderr, a report in a folder."""

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
Validate = Callable[[list[str]], int]  # main of scripts/validate_fp8.py, passed in by the command


def validate_graph(validate: Validate, reference: Path, candidate: Path, calibration: Path) -> Path:
    """Compare two ONNX graphs on the rows of a calibration set; return the report's folder, beside the candidate.

    With its decoder under the same root, audio is compared too and an HTML page is written. Raises GateError.
    """
    out = candidate.with_name(f"{candidate.name}.validation")
    root = candidate.resolve().parent.parent
    dit = str(targets.publishable_at(candidate).dit)
    audible = resolve.local_onnx(root, targets.decoder_for(dit, "fp16mixed")) is not None
    argv = ["--reference", str(reference), "--candidate", str(candidate), "--backend", engines.DIRECT.name]
    argv += ["--calib", str(calibration), "--prompts", str(PROMPTS), "--out", str(out)]
    _run(validate, [*argv, *(["--onnx-root", str(root), "--html"] if audible else ["--no-audio"])])
    return out


def require_dits(chosen: Sequence[targets.Target]) -> list[targets.Target]:
    """Return the DiTs among targets. Raises ToolError when there is no DiT to validate."""
    dits = [target for target in chosen if target.kind == "dit"]
    if not dits:
        raise ToolError("--validate requires at least one DiT", "add one, for example sa3-m-fp8")
    return dits


def validate_target(
    validate: Validate, target: targets.Target, backend: str, arches: Sequence[str], source: ModelSource
) -> Path:
    """Compare a compiled DiT with the FP16-mixed one (that one with fp32); return the report's folder.

    The engine runs if this machine's GPU is one of `arches`, and so does the reference's if it is built; otherwise ONNX
    Runtime runs the source ONNX. Raises ToolError and GateError.
    """
    record = engines.BACKENDS[backend]
    arch_here = record.arch_here()
    is_built = arch_here in arches
    if not is_built:
        print(f"no GPU of {', '.join(arches)} in this machine: validating the ONNX of {target.name}", file=sys.stderr)
    dit = str(target.dit)
    reference = "fp32" if target.precision == "fp16mixed" else "fp16mixed"
    reference_target = targets.dit_target(dit, reference)
    reference_is_built = is_built and record.engine_path(source.models_dir, str(arch_here), reference_target).is_file()
    out = source.models_dir / "validation" / target.name
    argv = ["--dit", dit, "--reference", reference, "--candidate", target.precision]
    argv += ["--models-dir", str(source.models_dir), "--out", str(out), "--html"]
    argv += ["--reference-backend", backend if reference_is_built else engines.DIRECT.name]
    argv += ["--candidate-backend", backend if is_built else engines.DIRECT.name]
    argv += ["--backend", engines.AUTO if is_built else engines.DIRECT.name]
    _run(validate, [*argv, *(["--onnx-root", str(source.onnx_root)] if source.onnx_root is not None else [])])
    return out


def _run(validate: Validate, argv: list[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # stdout is reserved for the command's own output
        validate(argv)
