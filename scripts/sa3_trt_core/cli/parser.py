"""The flags of the command `sa3_trt`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sa3_trt_core import engines, shapes, targets
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type
from sa3_trt_core.cli.lora_flags import add_lora_flags
from sa3_trt_core.request import FULL_APG, LEAST_NOISE, MOST_CFG, MOST_PADDING, MOST_SEED, MOST_STEPS, SCHEDULE_ORDERS
from sa3_trt_core.version import __version__

MOST_COUNT = 10_000

LOCAL_RAY = "local"  # of --ray without an address


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(prog="sa3_trt", description="Stable Audio 3: 44.1 kHz stereo from text, from sound, or from both.")
    parse.add_argument("--prompt", action="append", metavar="P", help="what to generate (may be repeated, or empty)")
    parse.add_argument("--prompts-file", type=Path, metavar="F", help="one prompt or JSON object a line (-: stdin)")
    _add_model(parse)
    _add_sampling(parse)
    _add_sound(parse)
    add_lora_flags(parse, refits=True)
    parse.add_argument(
        "--again", type=Path, metavar="F", help="make this sound of sa3_trt again; other flags change it"
    )
    parse.add_argument(
        "--count", type=integer_type(1, MOST_COUNT), default=1, metavar="N", help="results of each prompt"
    )
    parse.add_argument("--version", action="version", version=f"sa3_trt {__version__}", help="print it and stop")
    parse.add_argument(
        "--shard", type=_shard, metavar="I/N", help="make every Nth sound, from the Ith on: for a batch scheduler"
    )
    parse.add_argument("--quiet", action="store_true", help="no progress")
    parse.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parse.add_argument("--dry-run", action="store_true", help="print what would be used and stop")
    return parse


def _add_model(parse: argparse.ArgumentParser) -> None:
    group = parse.add_argument_group("model")
    group.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="the model (default: %(default)s)")
    group.add_argument(
        "--precision", choices=targets.PRECISIONS, default=targets.PRECISIONS[0], help="its DiT (default: %(default)s)"
    )
    group.add_argument("--backend", choices=engines.CHOICES, default=engines.AUTO, help=engines.AUTO_HELP)
    group.add_argument(
        "--chunk-frames", type=integer_type(0, shapes.MAX_FRAMES, "latent frames"), metavar="N",
        help="window of encoder and decoder, 0 for one piece (default: 256 beyond 512 latent frames)",
    )  # fmt: skip
    group.add_argument(
        "--free-models", action="store_true", help="hold one model at a time: less memory, and loading at every stage"
    )
    group.add_argument("--device", metavar="N", help="the GPU to use, as nvidia-smi -L counts, or cpu (default: 0)")
    group.add_argument("--devices", metavar="N,N", help="several, or cpu,cpu: a worker each, on a Ray of this machine")
    group.add_argument(
        "--ray", nargs="?", const=LOCAL_RAY, metavar="ADDRESS", help="workers on all GPUs of a Ray cluster, or of here"
    )
    group.add_argument("--models-dir", type=Path, metavar="D", help="engines (default: $SA3_MODELS_DIR, else models)")
    group.add_argument("--onnx-root", type=Path, metavar="D", help="ONNX files (default: $SA3_ONNX_DIR, else the hub)")
    group.add_argument("--revision", metavar="R", help="the hub's commit or branch, instead of the pinned one")
    group.add_argument("--offline", action="store_true", help="take the hub's files from its cache only")


def _add_sampling(parse: argparse.ArgumentParser) -> None:
    group = parse.add_argument_group("sampling")
    seconds = number_type(shapes.MIN_SECONDS, math.floor(shapes.MAX_SECONDS * 100) / 100, "seconds")
    group.add_argument("--seconds", type=seconds, default=30.0, metavar="S", help="length (default: 30)")
    group.add_argument("--steps", type=integer_type(1, MOST_STEPS, "steps"), default=8, metavar="N", help="default: 8")
    group.add_argument(
        "--seed",
        type=integer_type(-1, MOST_SEED),
        metavar="N",
        help="of the first row, one more for each that follows (default: -1, a random one)",
    )
    rows = integer_type(1, shapes.MAX_BATCH)
    group.add_argument("--batch", type=rows, metavar="B", help="rows a forward, step by step together (default: 1)")
    group.add_argument("--depth", type=rows, metavar="D", help="rows a forward in a ring, each at a step of its own")
    group.add_argument(
        "--cfg", type=number_type(0, MOST_CFG), default=1.0, metavar="X", help="guidance (default: 1, none)"
    )
    group.add_argument(
        "--apg", type=number_type(0, FULL_APG), metavar="X", help="0 plain guidance, 1 projected (default)"
    )
    group.add_argument("--negative-prompt", metavar="P", help="what to lead away from; needs --cfg")
    group.add_argument(
        "--legacy-schedule", action="store_true", help="the published TensorRT runtime's noise and length"
    )
    group.add_argument(
        "--schedule-order", choices=SCHEDULE_ORDERS, default=SCHEDULE_ORDERS[0],
        help="of the noise levels of audio to audio; the second is the model's main branch's (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--duration-padding", type=number_type(0, MOST_PADDING, "seconds"), default=shapes.PADDING_SECONDS, metavar="S",
        help="generated after the end and thrown away (default: %(default)g)",
    )  # fmt: skip


def _add_sound(parse: argparse.ArgumentParser) -> None:
    group = parse.add_argument_group("sound")
    group.add_argument("--init-audio", type=Path, metavar="F", help="a sound to start from, of any format and rate")
    group.add_argument("--init-start", type=number_type(0, 1e6, "seconds"), default=0.0, metavar="S", help="read from")
    group.add_argument(
        "--init-noise-level", type=number_type(LEAST_NOISE, 1.0), metavar="X", help="how free of it: 0.01 to 1"
    )
    group.add_argument(
        "--inpaint-range", type=_range, action="append", default=[], metavar="A,B",
        help="seconds of --init-audio to make anew (may be repeated)",
    )  # fmt: skip
    group.add_argument("--paste-kept", action="store_true", help="put the kept latent back after every step")
    group.add_argument(
        "--out", type=Path, metavar="F", help="its extension is the format (default: output/<prompt>_<seed>.wav)"
    )
    group.add_argument("--out-dir", type=Path, metavar="D", help="folder of <number>_<prompt>_<seed>.wav")
    group.add_argument(
        "--format", choices=[suffix[1:] for suffix in audio_io.FORMATS], help="without --out (default: wav)"
    )
    group.add_argument("--bits", choices=tuple(audio_io.BITS), default="16", help="a sample (default: %(default)s)")
    group.add_argument(
        "--peak", choices=audio_io.PEAKS, default="clip", help="beyond full scale (default: %(default)s)"
    )
    group.add_argument("--save-latents", type=Path, metavar="F.npz", help="also save latents, sigmas, seed, seconds")


def _shard(text: str) -> tuple[int, int]:
    """ "2/8" as numbers."""
    first, _, count = text.partition("/")
    if not (first.isascii() and first.isdigit() and count.isascii() and count.isdigit() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N")
    if not 1 <= int(first) <= int(count):
        raise argparse.ArgumentTypeError(f"{text}: I is 1 to N")
    return int(first), int(count)


def _range(text: str) -> tuple[float, float]:
    """ "1.5,4" as numbers."""
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers A,B") from None
    return start, end
