"""Time complete generations, text to samples: the PyTorch engines and diffusers' pipeline, on random weights."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_bench.generation import Subject
    from sa3_bench.generation_results import Contestant, Record

LENGTHS = (3.0, 30.0, 54.0, 120.0, 380.0)
OURS = {"fp8": ("fp8", "fp8"), "fp8-fp16": ("fp8", "fp16"), "fp16mixed": ("fp16mixed", "fp16")}
PEERS = ("eager", "compiled")
PEER_LENGTHS = {"eager": (3.0, 30.0, 54.0, 120.0), "compiled": (54.0,)}  # others take minutes, or no GPU's memory
CHECKED_FRAMES = 64


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="bench_generate.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of generate.json, generate.md and generate.png")
    parser.add_argument("--seconds", type=number_type(1, 380, "seconds"), nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--precisions", nargs="*", choices=tuple(OURS), default=list(OURS),
        help="precisions of DiT and decoder: fp8 is FP8 for both, fp8-fp16 an FP8 DiT and an fp16 decoder, fp16mixed "
        "an FP16-mixed DiT and an fp16 decoder",
    )  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="diffusers, fp16")
    parser.add_argument(
        "--repeats",
        type=integer_type(1, 1000),
        default=20,
        help="number of timings of each call, 1 to 1000 (default: 20)",
    )
    parser.add_argument(
        "--untuned", action="store_true", help="use the tile sizes of an H100 instead of measuring them"
    )
    parser.add_argument(
        "--start",
        action="store_true",
        help="also time a new sa3_trt process to its first WAV of 54 s (with --tiny: 1 s)",
    )
    parser.add_argument(
        "--ring", type=integer_type(1, 64, "slots"), nargs="*", default=[], metavar="D",
        help="also time continuous batching at these depths: sounds of 54 s per second (with --tiny: 1 s)",
    )  # fmt: skip
    parser.add_argument(
        "--sounds", type=integer_type(1, 100_000), default=200, metavar="N",
        help="timed sounds of each --ring (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="use a tiny model, also on a CPU: a functional check only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Time and check all contestants, and write the report."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core.artifacts import files

    files.require_writable(args.out / "generate.json", "--out")
    import torch

    if not torch.cuda.is_available() and not args.tiny:
        raise ToolError("the benchmark needs an NVIDIA GPU", "--tiny runs a tiny model on this machine")
    from sa3_bench.generation import Ours, Subject, decoder_snr
    from sa3_bench.generation_results import measure, new_record

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject, record = Subject.make(device, args.tiny), new_record()
    for name, contestant, served in _contestants(args, subject):
        peer = not isinstance(contestant, Ours)
        if isinstance(contestant, Ours):
            record.notes[f"{name}: decoder against diffusers fp32"] = decoder_snr(subject, contestant, CHECKED_FRAMES)
        lengths, others = (
            [each for each in args.seconds if served is None or each in served],
            0 if peer else subject.bytes,
        )
        record.timings += measure(name, contestant, lengths, args.repeats, others)
        contestant.close()
        record.save(args.out)
    if args.start or args.ring:
        _from_files(args, subject, record)
        record.save(args.out)
    print(record.markdown())
    return 0


def _from_files(args: argparse.Namespace, subject: Subject, record: Record) -> None:
    """Write engines of the random weights, and time fresh processes and rings on them."""
    from sa3_bench import generation_start, ring_rate

    seconds = 1.0 if subject.tiny else 54.0
    with tempfile.TemporaryDirectory() as scratch:
        generation_start.write_engines(subject, Path(scratch))
        generation_start.release()
        if args.start:
            record.starts.update(generation_start.starts(Path(scratch), seconds))
        if args.ring:
            record.rings += ring_rate.rings_of_folder(Path(scratch), seconds, args.ring, args.sounds)


def _contestants(
    args: argparse.Namespace, subject: Subject
) -> Iterator[tuple[str, Contestant, tuple[float, ...] | None]]:
    """Yield name, contestant and its lengths (None for all); each is created after the previous one is done."""
    from sa3_bench.generation import Ours, Pipeline

    for name in args.precisions:
        yield name, Ours(subject, *OURS[name], not args.untuned), None
    for name in args.peers:
        yield f"diffusers fp16 {name}", Pipeline(subject, name == "compiled"), None if args.tiny else PEER_LENGTHS[name]


if __name__ == "__main__":
    sys.exit(run_command(main))
