"""Time a DiT step: the PyTorch engine and its peers on random weights of full size, or this machine's engines."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import targets
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, integer_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_bench.results import Record

LENGTHS = (323, 646, 1292, 4096)
RING_LENGTH = 646
RING_BATCHES = (2, 4, 8)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="bench_dit.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of bench.json, bench.md and bench.png")
    frames = integer_type(1, 4096)
    parser.add_argument(
        "--lengths", type=frames, nargs="+", default=list(LENGTHS), help="numbers of latent frames, batch 1"
    )
    parser.add_argument(
        "--batches", type=integer_type(1, 8), nargs="*", default=list(RING_BATCHES), help="rows of a ring of 646 frames"
    )
    parser.add_argument("--precisions", nargs="+", choices=("fp8", "fp16mixed"), default=["fp8", "fp16mixed"])
    parser.add_argument(
        "--peers", nargs="*", choices=("eager", "compiled", "torchao"), default=["eager", "compiled"],
        help="diffusers in fp16: eager, with compiled blocks, and compiled with torchao's float8",
    )  # fmt: skip
    parser.add_argument(
        "--repeats",
        type=integer_type(1, 10_000),
        default=200,
        help="number of timings of each contestant, alternating, 1 to 10000 (default: 200)",
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny DiT, also on a CPU: a functional check only")
    files = parser.add_argument_group("this machine's engines, instead of random weights")
    files.add_argument(
        "--engines", nargs="+", metavar="P@B",
        help="engines as precision@backend, the reference first: fp16mixed@tensorrt fp8@tensorrt fp8@torch",
    )  # fmt: skip
    files.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="the model (default: %(default)s)")
    add_folder_flags(files)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Time and check all contestants, and write the report."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core.artifacts import files

    files.require_writable(args.out / "bench.json", "--out")

    shapes = [(1, frames) for frames in args.lengths] + [(rows, RING_LENGTH) for rows in args.batches]
    record = _engines(args, shapes) if args.engines else _random(args, shapes)
    print(record.markdown())
    return 0


def _random(args: argparse.Namespace, shapes: list[tuple[int, int]]) -> Record:
    """Time our engine and its peers on random weights."""
    import torch

    if not torch.cuda.is_available() and not args.tiny:
        raise ToolError("the benchmark needs an NVIDIA GPU", "--tiny runs a tiny DiT on this machine")

    from sa3_bench import peers, results

    peer_names = {"eager": peers.EAGER, "compiled": peers.COMPILED, "torchao": peers.TORCHAO}
    names = [*args.precisions, *(peer_names[name] for name in args.peers)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return results.run(peers.contest_of(names, args.tiny, device), shapes, args.repeats, args.out)


def _engines(args: argparse.Namespace, shapes: list[tuple[int, int]]) -> Record:
    """Time engines from their files."""
    from sa3_bench import engine_runs, results
    from sa3_trt_core import paths
    from sa3_validation.models import ModelPaths

    model_paths = ModelPaths(args.dit, paths.ModelSource.of(args.onnx_root, args.models_dir))
    models = engine_runs.find_engines(args.engines, model_paths)
    with ExitStack() as stack:
        return results.run(engine_runs.contest_of(models, stack), shapes, args.repeats, args.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
