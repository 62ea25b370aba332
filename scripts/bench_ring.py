"""Time the ring on this machine's engines: sounds per second, the DiT's share, latency from submission to sound."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from sa3_trt_core import engines, shapes, targets
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, integer_type, number_type, run_command
from sa3_trt_core.cli.devices import choose_devices
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.request import Request


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="bench_ring.py", description=__doc__)
    parser.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="model (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=targets.PRECISIONS, default="fp8", help="precision of the DiT (default: %(default)s)"
    )
    parser.add_argument("--backend", default=engines.AUTO, help="backend, as in sa3_trt (default: auto)")
    parser.add_argument("--device", metavar="N", help="GPU to use, or cpu (default: the first GPU)")
    add_folder_flags(parser)
    parser.add_argument(
        "--ring",
        type=integer_type(1, 64, "places"),
        nargs="+",
        default=[8],
        metavar="D",
        help="depths of the ring (default: 8)",
    )
    parser.add_argument(
        "--seconds", type=number_type(shapes.MIN_SECONDS, 374, "seconds"), default=54.0, metavar="S",
        help="length of every sound, 0.01 to 374 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sounds",
        type=integer_type(1, 100_000),
        default=200,
        metavar="N",
        help="number of timed sounds, 1 to 100000 (default: 200)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Time every depth; one JSON document on stdout. Raises ToolError."""
    args = make_parser().parse_args(argv)
    choose_devices(args.device, None)
    from sa3_bench.ring_rate import PROMPT, measure_ring
    from sa3_trt_core.model_loader import make_plan
    from sa3_trt_core.pipeline import Generator

    source = ModelSource.of(args.onnx_root, args.models_dir)
    with Generator.open(make_plan(args.dit, args.precision, args.backend, source)) as generator:
        request = Request(PROMPT, args.seconds)
        figures = [measure_ring(generator, request, depth, args.sounds) for depth in args.ring]
        where = dict(generator.engines.devices)
    rows = [{**asdict(run), "sounds_per_second": run.rate, "seconds": args.seconds} for run in figures]
    print(json.dumps({"devices": where, "precision": args.precision, "rings": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
