"""Quantise an FP16-mixed DiT to FP8 with scales from a calibration set, and prove the result."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_build.passes import shaping
from sa3_build.quantization.settings import QuantizationSettings
from sa3_build.recipes.fp8_settings import from_arguments
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_build.recipes.fp8 import Fp8Recipe

DEFAULT_HEADROOM = 2.0
SHOWN = ("free-batch", "widen-fp16", "null-row", "bake-rope", "stack-attention", "pad-k")  # passes with a line each


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="build_dit_fp8.py", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="FP16-mixed DiT graph")
    parser.add_argument(
        "--calib", type=Path, required=True, metavar="X.npz", help="calibration set from build/make_calib.py"
    )
    parser.add_argument("--onnx", type=Path, required=True, metavar="dit_fp8.onnx", help="FP8 graph to write")
    parser.add_argument(
        "--engine", type=Path, metavar="E", help="also compile this TensorRT engine, for this machine's GPU"
    )
    parser.add_argument(
        "--headroom", type=number_type(1, 448), default=DEFAULT_HEADROOM,
        help=f"activation scale = amax * headroom / 448, 1..448 (default: {DEFAULT_HEADROOM:g}, see build/NOTES.md)",
    )  # fmt: skip
    parser.add_argument(
        "--ptq", choices=("auto", "modelopt", "direct"), default="auto",
        help="inserter of Q/DQ pairs: ModelOpt, or this project's pass, which needs less memory; the result is the "
        "same (default: auto, i.e. ModelOpt if its memory is free)",
    )  # fmt: skip
    _recipe_flags(parser)
    parser.add_argument(
        "--min-cosine", type=number_type(0, 1), default=0.9, help="minimum denoised cosine, 0..1 (default: 0.9)"
    )
    parser.add_argument(
        "--parity-rows", type=integer_type(1, 10**6), default=64, metavar="N", help="rows to compare on (default: 64)"
    )
    parser.add_argument(
        "--rollouts", type=integer_type(0, 10**6), default=QuantizationSettings.rollouts, metavar="N",
        help="number of full generations to compare, each also perturbed (default: 2, i.e. 128 forwards; 0: none)",
    )  # fmt: skip
    parser.add_argument(
        "--free-batch", action=argparse.BooleanOptionalAction, default=True,
        help="make a batch axis that is fixed at 1 dynamic; fail if that is impossible (default: yes)",
    )  # fmt: skip
    shaping.add_flags(parser)
    parser.add_argument(
        "--work-dir", type=Path, metavar="D", help="directory for intermediate files (default: beside the output)"
    )
    parser.add_argument("--keep-intermediates", action="store_true", help="keep the intermediate files")
    parser.add_argument(
        "--validate", action="store_true",
        help="then run scripts/validate_fp8.py (generations, audio, gates, page); output in dit_fp8.onnx.validation",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="check the inputs, print the stages and their requirements, and exit"
    )
    parser.add_argument("--force", action="store_true", help="rebuild even if the artefact is current")
    return parser


def _recipe_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", choices=("fp8", "fp16"), default="fp8", help="storage of quantised weights (default: fp8)"
    )
    parser.add_argument(
        "--rounding", choices=("gptq", "nearest"),
        help="rounding of weights to E4M3: gptq chooses codes whose errors compensate each other on calibration rows, "
        "at the same inference speed (default: gptq if the codes are stored, else nearest)",
    )  # fmt: skip
    parser.add_argument(
        "--target-cosine", type=number_type(0, 0.999999), metavar="C",
        help="keep as few layers in 16 bits as possible with this denoised cosine on every parity row, 0..0.999999",
    )  # fmt: skip
    parser.add_argument(
        "--max-fp16-linears", "--max-fp16-products", type=integer_type(0, 10**6), metavar="N", dest="max_fp16_products",
        help="with --target-cosine: maximum number of 16-bit layers; nothing is written if it is not enough",
    )  # fmt: skip
    parser.add_argument(
        "--recipe", choices=("ours", "reference"), default="ours",
        help="reference: the published choices, for comparison only; sets --ptq and --headroom (default: ours)",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Quantise the DiT, prove the result, print the report."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core import gpu
    from sa3_trt_core.artifacts import files

    arch = gpu.current_arch()
    if args.engine is not None:
        files.require_writable(args.engine, "engine")
        if arch is None:
            raise ToolError("--engine requires an NVIDIA GPU", "omit it, or build on a machine with a GPU")

    from sa3_build.recipes.fp8 import Fp8Recipe

    settings, reason = from_arguments(args)
    same_result = ("modelopt", "direct") if args.ptq == "auto" else ()
    recipe = Fp8Recipe(args.input, args.calib, args.onnx, settings, args.work_dir, args.keep_intermediates, same_result)
    current = recipe.is_current and not args.force
    if args.dry_run:
        _show_plan(recipe, reason, current)
        return 0
    if not current:
        print(f"--ptq {settings.ptq}: {reason}", file=sys.stderr)
    report = None if current else recipe.run(args.force)
    if report is None:
        print(f"{args.onnx} is current")
    else:
        _print(report, args.onnx)
        if args.keep_intermediates:
            print(f"intermediate graphs: {recipe.work}")
    if args.validate:
        import validate_fp8

        from sa3_build.recipes.validation import validate_graph

        print(f"validated: {validate_graph(validate_fp8.main, args.input, args.onnx, args.calib)}")
    if args.engine is not None and arch is not None:
        from sa3_build.engines.tensorrt import compile_engine
        from sa3_trt_core.targets import publishable_at

        built = compile_engine(args.onnx, publishable_at(args.onnx), "tensorrt", arch, args.engine)
        print(f"{built.path}: {built.bytes} bytes")
    return 0


def _show_plan(recipe: Fp8Recipe, reason: str, current: bool) -> None:
    """Print the stages and their requirements; nothing is written."""
    from sa3_trt_core import console

    print(console.table(("stage", "leaves"), [list(stage) for stage in recipe.plan]))
    needs = recipe.needs
    print(f"--ptq {recipe.settings.ptq}: {reason}")
    sizes = (f"{name} {console.format_bytes(size)}" for name, size in needs.as_dict.items())
    print(f"about: {', '.join(sizes)}; working folder {recipe.work}")
    print("the artefact is current: nothing to do" if current else "nothing was written")


def _print(report: dict[str, Any], artefact: Path) -> None:
    from sa3_build.recipes.fp8 import report_path
    from sa3_build.verification.parity import KIND_HEADER, PARITY_HEADER, KindParity, SigmaParity, parity_rows
    from sa3_build.verification.rollouts import CONTROL_HEADER, control_rows, drifted
    from sa3_trt_core import console

    stages = report["stages"]
    rows = [[name, f"{done['seconds']:.1f}"] for name, done in stages.items()]
    print(console.table(("stage", "seconds"), rows))
    for entry in stages["clean"]["passes"]:
        if entry["name"] in SHOWN:
            counts = ", ".join(f"{count} {name}" for name, count in entry.items() if name not in ("name", "notes"))
            print("\n  ".join([f"{entry['name']}: {counts}", *entry.get("notes", ())]))
    for check in stages["scales"]["proof"]:
        print(f"proof: {check['claim']}: {'holds' if check['holds'] else 'FAIL'} ({check['checked']} checked)")
    if "rounding" in stages:
        rounding = stages["rounding"]
        fitted = f"{rounding['rows']} rows ({rounding['rows_also_in_parity']} of them also parity rows)"
        print(
            f"weights rounded by GPTQ on {fitted}; {rounding['codes_not_nearest']:.0%} of the codes are not the nearest"
        )
    if "sensitivity" in stages:
        kept, forwards = len(stages["sensitivity"]["kept"]), stages["sensitivity"]["forwards"]
        print(f"{kept} linears stay in 16 bits for the target cosine ({forwards} forwards)")
    share = stages["quantize"]["fp8_share_of_token_macs"]
    print(f"{stages['quantize']['quantized_linears']} linears in FP8, {share:.1%} of the trunk's multiply-adds")
    parity = [SigmaParity(**p) for p in stages["parity"]["parity"]]
    print(console.table(PARITY_HEADER, parity_rows(parity)))
    print(console.table(KIND_HEADER, parity_rows([KindParity(**p) for p in stages["parity"]["by_kind"]])))
    if "rollouts" in stages:
        controls, candidate = stages["rollouts"]["controls"], stages["rollouts"]["candidates"][0]
        print(console.table(CONTROL_HEADER, control_rows(controls)))
        for number, (kind, rollout) in enumerate(zip(stages["rollouts"]["kinds"], candidate["rollouts"], strict=True)):
            error = f"cosine {rollout['cosine']:.6f}, equivalent perturbation of x {drifted(rollout)}"
            print(f"generation {number} ({kind}): {error}")
    worst = stages["shares"]["worst"]
    print(f"largest share of an activation: saturated {worst['saturated']:.1e}, subnormal {worst['subnormal']:.1%}")
    print(f"{artefact}, report {report_path(artefact).name}")


if __name__ == "__main__":
    sys.exit(run_command(main))
