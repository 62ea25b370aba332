"""Merge LoRA adapters into a DiT graph, and quantise the result with the decisions of a finished FP8 build."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.cli.arguments import Parser, run_command
from sa3_trt_core.cli.lora_flags import add_lora_flags, lora_options, lora_specs
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_build.lora.merge import Merged
    from sa3_trt_core.lora.lora_set import LoraSet


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="merge_lora.py", description=__doc__)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="fp32 or FP16-mixed DiT graph"
    )
    add_lora_flags(parser, required=True)
    parser.add_argument(
        "--onnx", type=Path, metavar="OUT", help="graph to write (default: beside --input, with the set's digest)"
    )
    parser.add_argument("--fp8-base", type=Path, metavar="dit_fp8.onnx", help="FP8 graph that was built from --input")
    parser.add_argument(
        "--fp8-onnx", type=Path, metavar="OUT", help="FP8 graph to write (default: beside --fp8-base, with the digest)"
    )
    parser.add_argument(
        "--rounding", choices=("nearest", "gptq"), default="nearest",
        help="rounding of merged weights to E4M3: nearest (seconds), or GPTQ on --calib (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--calib", type=Path, metavar="X.npz", help="calibration set, for --rounding gptq")
    parser.add_argument("--force", action="store_true", help="merge again even if the artefacts are current")
    parser.add_argument("--dry-run", action="store_true", help="check the adapters against the graph and exit")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Merge the adapters; with --fp8-base also quantise the result."""
    args = make_parser().parse_args(argv)
    if args.rounding == "gptq" and (args.calib is None or args.fp8_base is None):
        raise ToolError("--rounding gptq requires --fp8-base and --calib", "give both, or omit --rounding")
    if args.fp8_onnx is not None and args.fp8_base is None:
        raise ToolError("--fp8-onnx requires --fp8-base", "give the FP8 graph that was built from --input")

    from sa3_build.graph import io as graph_io
    from sa3_build.lora.graph_layers import find_layers
    from sa3_build.lora.merge import require_mergeable
    from sa3_trt_core import targets
    from sa3_trt_core.artifacts import files
    from sa3_trt_core.lora.lora_set import read_loras

    loras = read_loras(lora_specs(args), lora_options(args))
    out = args.onnx or args.input.with_name(targets.with_digest(args.input.name, loras.digest))
    fp8_out = args.fp8_onnx
    if args.fp8_base is not None and fp8_out is None:
        fp8_out = args.fp8_base.with_name(targets.with_digest(args.fp8_base.name, loras.digest))
    for path, base in ((out, args.input), (fp8_out, args.fp8_base)):
        if path is not None:
            files.require_writable(path, "graph")
            if path.resolve() in (args.input.resolve(), base.resolve()):
                raise ToolError(f"{path} is also an input", "choose another file with --onnx")
    for line in loras.described():
        print(f"LoRA {line}", file=sys.stderr)
    if args.dry_run:
        _, layers = find_layers(args.input)
        require_mergeable(layers, args.input, loras)
        print(f"{len(loras.layers & layers.keys())} of {len(layers)} layers would be merged into {out}")
        return 0
    _merge(args, loras, out)
    if args.fp8_base is not None:
        _requantize(args, loras, out, fp8_out)
    print(f"digest {loras.digest}: {graph_io.bytes_of(out)} bytes in {out}")
    return 0


def _merge(args: argparse.Namespace, loras: LoraSet, out: Path) -> None:
    from sa3_build.lora.artefact import make
    from sa3_build.lora.merge import merge_graph
    from sa3_trt_core.lora.svd_bases import SvdBases

    bases = SvdBases(args.input.with_name(args.input.name + ".svd"), args.lora_bases)
    settings: dict[str, Any] = {"base": args.input.name}

    def work(graph: Path) -> Merged:
        return merge_graph(args.input, loras, graph, bases)

    merged = make(out, "fp16mixed", [args.input], loras, settings, work, args.force)
    _show(out, merged)


def _requantize(args: argparse.Namespace, loras: LoraSet, merged_graph: Path, out: Path) -> None:
    import tempfile

    from sa3_build.lora.artefact import make
    from sa3_build.lora.requantize import fitted_codes, requantize
    from sa3_trt_core.lora.svd_bases import SvdBases

    bases = SvdBases(args.input.with_name(args.input.name + ".svd"), args.lora_bases)
    settings: dict[str, Any] = {"base": args.fp8_base.name, "rounding": args.rounding}
    inputs = [args.input, args.fp8_base, *([args.calib] if args.rounding == "gptq" else [])]

    def work(graph: Path) -> Merged:
        if args.rounding == "nearest":
            return requantize(args.fp8_base, args.input, loras, graph, bases)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
            codes = fitted_codes(merged_graph, args.calib, loras.layers, Path(folder))
        return requantize(args.fp8_base, args.input, loras, graph, bases, codes)

    _show(out, make(out, "fp8", inputs, loras, settings, work, args.force))


def _show(out: Path, merged: Merged | None) -> None:
    if merged is None:
        print(f"{out} is current")
        return
    print(f"{out}: {len(merged.changes)} layers changed by {merged.mean_change:.1%} on average (|dW| / |W|)")


if __name__ == "__main__":
    sys.exit(run_command(main))
