"""Quantise a FP16-mixed DiT to FP8: trunk in E4M3, islands in fp32, scales from a calibration set, then a proof."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_build.passes import shaping
from sa3_build.quantization.settings import Settings
from sa3_build.recipes.fp8_settings import from_arguments
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_build.recipes.fp8 import Fp8Recipe

DEFAULT_HEADROOM = 2.0
SHOWN = ("free-batch", "widen-fp16", "null-row", "bake-rope", "stack-attention", "pad-k")  # passes with a line each


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="build_dit_fp8.py", description=__doc__)
    line.add_argument(
        "--input", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="the FP16-mixed DiT graph"
    )
    line.add_argument("--calib", type=Path, required=True, metavar="X.npz", help="from build/make_calib.py")
    line.add_argument("--onnx", type=Path, required=True, metavar="dit_fp8.onnx", help="graph to write")
    line.add_argument(
        "--engine", type=Path, metavar="E", help="also compile this engine (tensorrt, this machine's GPU)"
    )
    line.add_argument(
        "--headroom", type=number_type(1, 448), default=DEFAULT_HEADROOM,
        help=f"activation scale = amax * headroom / 448 (default {DEFAULT_HEADROOM:g}, see build/NOTES.md)",
    )  # fmt: skip
    line.add_argument(
        "--ptq", choices=("auto", "modelopt", "direct"), default="auto",
        help="who places Q/DQ pairs: ModelOpt, or our own inserter in far less memory; the pairs and scales are the "
        "same (default auto: ModelOpt where its memory is there)",
    )  # fmt: skip
    _recipe_flags(line)
    line.add_argument("--min-cosine", type=number_type(0, 1), default=0.9, help="gate on the denoised latent")
    line.add_argument("--parity-rows", type=integer_type(1, 10**6), default=64, metavar="N", help="rows to compare on")
    line.add_argument(
        "--rollouts", type=integer_type(0, 10**6), default=Settings.rollouts, metavar="N",
        help="whole generations to compare, kinds of row in turn, beside perturbed ones (default 2: 128 forwards)",
    )  # fmt: skip
    line.add_argument(
        "--free-batch", action=argparse.BooleanOptionalAction, default=True,
        help="make a batch axis that is fixed at 1 dynamic, or refuse the graph (default: yes)",
    )  # fmt: skip
    shaping.add_flags(line)
    line.add_argument("--work-dir", type=Path, metavar="D", help="for what lies between (default: beside the output)")
    line.add_argument("--keep-intermediates", action="store_true", help="leave the working folder where it is")
    line.add_argument(
        "--validate", action="store_true",
        help="then scripts/validate_fp8.py: generations, their sound, gates and a page, in dit_fp8.onnx.validation",
    )  # fmt: skip
    line.add_argument("--dry-run", action="store_true", help="check the inputs, print what it would take, and stop")
    line.add_argument("--force", action="store_true", help="build even if the artefact is current")
    return line


def _recipe_flags(line: argparse.ArgumentParser) -> None:
    line.add_argument("--weights", choices=("fp8", "fp16"), default="fp8", help="how weights are stored (default fp8)")
    line.add_argument(
        "--rounding", choices=("gptq", "nearest"),
        help="of weights to E4M3: gptq lets the errors of a channel cancel on the calibration rows, at no cost when it "
        "is used (default gptq where the codes are stored)",
    )  # fmt: skip
    line.add_argument(
        "--target-cosine", type=number_type(0, 0.999999), metavar="C",
        help="leave the fewest products in 16 bits that hold this denoised cosine on every parity row",
    )  # fmt: skip
    line.add_argument(
        "--max-fp16-products", type=integer_type(0, 10**6), metavar="N",
        help="with --target-cosine: at most this many; if they do not reach it, nothing is written",
    )  # fmt: skip
    line.add_argument(
        "--recipe", choices=("ours", "reference"), default="ours",
        help="reference: the published recipe's choices, to compare with and not for use; it sets --ptq and --headroom",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Quantise, prove, report."""
    args = parser().parse_args(argv)

    from sa3_trt_core import gpu
    from sa3_trt_core.artifacts import files

    arch = gpu.current_arch()
    if args.engine is not None:
        files.require_writable(args.engine, "engine")
        if arch is None:
            raise ToolError(
                "--engine needs an NVIDIA GPU and none is visible", "leave it out; build on the GPU's machine"
            )

    from sa3_build.recipes.fp8 import Fp8Recipe

    settings, why = from_arguments(args)
    either = ("modelopt", "direct") if args.ptq == "auto" else ()
    recipe = Fp8Recipe(args.input, args.calib, args.onnx, settings, args.work_dir, args.keep_intermediates, either)
    current = recipe.is_current and not args.force
    if args.dry_run:
        _show_plan(recipe, why, current)
        return 0
    if not current:
        print(f"--ptq {settings.ptq}: {why}", file=sys.stderr)
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


def _show_plan(recipe: Fp8Recipe, why: str, current: bool) -> None:
    """The stages, and what they take; nothing has been written."""
    from sa3_trt_core import console

    print(console.table(("stage", "leaves"), [list(stage) for stage in recipe.plan]))
    needs = recipe.needs
    print(f"--ptq {recipe.settings.ptq}: {why}")
    sizes = (f"{name} {console.format_bytes(size)}" for name, size in needs.as_dict.items())
    print(f"about: {', '.join(sizes)}; working folder {recipe.work}")
    print("the artefact is current: nothing would be done" if current else "nothing was written")


def _print(report: dict[str, Any], artefact: Path) -> None:
    from sa3_build.recipes.fp8 import report_path
    from sa3_build.verification.parity import KIND_HEADER, PARITY_HEADER, KindParity, SigmaParity, parity_rows
    from sa3_build.verification.rollouts import CONTROL_HEADER, control_rows, drifted
    from sa3_trt_core import console

    stages = report["stages"]
    rows = [[name, f"{done['seconds']:.1f}"] for name, done in stages.items()]
    print(console.table(("stage", "seconds"), rows))
    for one in stages["clean"]["passes"]:
        if one["name"] in SHOWN:
            counts = ", ".join(f"{count} {name}" for name, count in one.items() if name not in ("name", "notes"))
            print("\n  ".join([f"{one['name']}: {counts}", *one.get("notes", ())]))
    for check in stages["scales"]["proof"]:
        print(f"proof: {check['claim']}: {'holds' if check['holds'] else 'FAILS'} ({check['checked']} looked at)")
    if "rounding" in stages:
        found = stages["rounding"]
        fitted = f"{found['rows']} rows, {found['rows_also_in_parity']} of them also in the parity below"
        print(f"weights rounded by GPTQ on {fitted}; {found['codes_not_nearest']:.0%} of the codes are not the nearest")
    if "sensitivity" in stages:
        kept, forwards = len(stages["sensitivity"]["kept"]), stages["sensitivity"]["forwards"]
        print(f"{kept} products stay in 16 bits for the target cosine ({forwards} forwards)")
    share = stages["quantize"]["fp8_share_of_token_macs"]
    print(f"{stages['quantize']['quantized_linears']} products in FP8, {share:.1%} of the trunk's multiply-adds")
    parity = [SigmaParity(**p) for p in stages["parity"]["parity"]]
    print(console.table(PARITY_HEADER, parity_rows(parity)))
    print(console.table(KIND_HEADER, parity_rows([KindParity(**p) for p in stages["parity"]["by_kind"]])))
    if "rollouts" in stages:
        controls, candidate = stages["rollouts"]["controls"], stages["rollouts"]["candidates"][0]
        print(console.table(CONTROL_HEADER, control_rows(controls)))
        for number, (kind, rollout) in enumerate(zip(stages["rollouts"]["kinds"], candidate["rollouts"], strict=True)):
            print(f"generation {number} ({kind}): cosine {rollout['cosine']:.6f}, as x {drifted(rollout)} off")
    worst = stages["shares"]["worst"]
    print(f"at most {worst['saturated']:.1e} of an activation saturates, {worst['subnormal']:.1%} is subnormal")
    print(f"{artefact}, report {report_path(artefact).name}")


if __name__ == "__main__":
    sys.exit(run_command(main))
