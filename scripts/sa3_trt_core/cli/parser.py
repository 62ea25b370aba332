"""Argument parser of the command `sa3_trt`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from sa3_trt_core import engines, shapes, targets
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, integer_type, number_type
from sa3_trt_core.cli.lora_flags import add_lora_flags
from sa3_trt_core.request import FULL_APG, MAX_CFG, MAX_PADDING, MAX_SEED, MAX_STEPS, MIN_NOISE, SCHEDULE_ORDERS
from sa3_trt_core.version import __version__

MAX_COUNT = 10_000
MAX_SECONDS = math.floor(shapes.MAX_SECONDS * 100) / 100  # rounded down to two decimals, as printed

LOCAL_RAY = "local"  # value of --ray without an address


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="sa3_trt", description="Stable Audio 3: 44.1 kHz stereo from text, from sound, or from both.")
    parser.add_argument(
        "--prompt", action="append", metavar="P", help="text to generate from, may be empty; repeat for several sounds"
    )
    parser.add_argument(
        "--prompts-file",
        type=Path,
        metavar="F",
        help="file with one prompt or JSON object per line; - reads standard input",
    )
    _add_model(parser)
    _add_sampling(parser)
    _add_sound(parser)
    add_lora_flags(parser, refits=True)
    parser.add_argument(
        "--again",
        type=Path,
        metavar="F",
        help="repeat a sound of sa3_trt from its metadata; other flags change single settings",
    )
    parser.add_argument(
        "--count",
        type=integer_type(1, MAX_COUNT),
        default=1,
        metavar="N",
        help=f"sounds for each prompt, seeds ascending (default: 1; 1 to {MAX_COUNT})",
    )
    parser.add_argument(
        "--version", action="version", version=f"sa3_trt {__version__}", help="print the version and exit"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="generate every Nth sound, starting with the Ith (1 to N), for a batch scheduler",
    )
    parser.add_argument("--quiet", action="store_true", help="print no progress")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table of stages")
    parser.add_argument(
        "--dry-run", action="store_true", help="print targets, backends and files that would be used, and exit"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="DiT to run (default: %(default)s)")
    group.add_argument(
        "--precision",
        choices=targets.PRECISIONS,
        default=targets.PRECISIONS[0],
        help="precision of the DiT (default: %(default)s); fp8 needs sm_89 or later",
    )
    group.add_argument("--backend", choices=engines.CHOICES, default=engines.AUTO, help=engines.AUTO_HELP)
    group.add_argument(
        "--chunk-frames", type=integer_type(0, shapes.MAX_FRAMES, "latent frames"), metavar="N",
        help="latent frames that encoder and decoder process at a time; 0: all (default: 256 beyond 512 frames)",
    )  # fmt: skip
    group.add_argument(
        "--free-models",
        action="store_true",
        help="keep one network in memory at a time; each is loaded again when its stage begins",
    )
    group.add_argument("--device", metavar="N", help="GPU index as in nvidia-smi -L, or cpu (default: 0)")
    group.add_argument("--devices", metavar="N,N", help="GPU indices, or cpu,cpu: one worker each on a local Ray")
    group.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL_RAY,
        metavar="ADDRESS",
        help="run one worker on each GPU of a Ray cluster; without ADDRESS on a local Ray",
    )
    add_folder_flags(group)
    group.add_argument(
        "--revision", metavar="R", help="commit or branch of the hub repository (default: the pinned commit)"
    )
    group.add_argument("--offline", action="store_true", help="use only files of the hub's local cache")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    seconds = number_type(shapes.MIN_SECONDS, MAX_SECONDS, "seconds")
    group.add_argument(
        "--seconds",
        type=seconds,
        default=30.0,
        metavar="S",
        help=f"length of each sound in seconds (default: 30; {shapes.MIN_SECONDS:g} to {MAX_SECONDS:g})",
    )
    group.add_argument(
        "--steps",
        type=integer_type(1, MAX_STEPS, "steps"),
        default=8,
        metavar="N",
        help=f"sampler steps (default: 8; 1 to {MAX_STEPS})",
    )
    group.add_argument(
        "--seed",
        type=integer_type(-1, MAX_SEED),
        metavar="N",
        help="seed of the first sound, one more for each that follows (default: -1, a random seed)",
    )
    rows = integer_type(1, shapes.MAX_BATCH)
    group.add_argument(
        "--batch",
        type=rows,
        metavar="B",
        help=f"sounds of equal length in one forward, in step (default: 1; 1 to {shapes.MAX_BATCH})",
    )
    group.add_argument(
        "--depth",
        type=rows,
        metavar="D",
        help=f"sounds in one forward at different steps: continuous batching (1 to {shapes.MAX_BATCH})",
    )
    group.add_argument(
        "--cfg",
        type=number_type(0, MAX_CFG),
        default=1.0,
        metavar="X",
        help=f"classifier-free guidance scale (default: 1, no guidance; 0 to {MAX_CFG:g})",
    )
    group.add_argument(
        "--apg",
        type=number_type(0, FULL_APG),
        metavar="X",
        help="strength of the guidance's projection, 0 to 1 (default: 1)",
    )
    _add_schedule(group)


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--negative-prompt", metavar="P", help="text to guide away from; needs --cfg other than 1")
    group.add_argument(
        "--legacy-schedule",
        action="store_true",
        help="noise levels and latent length of the published TensorRT runtime",
    )
    group.add_argument(
        "--schedule-order", choices=SCHEDULE_ORDERS, default=SCHEDULE_ORDERS[0],
        help="order for audio to audio; scale-then-warp as the model's main branch (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--duration-padding", type=number_type(0, MAX_PADDING, "seconds"), default=shapes.PADDING_SECONDS, metavar="S",
        help="seconds generated after the end and cut off (default: %(default)g)",
    )  # fmt: skip


def _add_sound(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sound")
    group.add_argument(
        "--init-audio", type=Path, metavar="F", help="sound file to start from; any format and sample rate"
    )
    group.add_argument(
        "--init-start",
        type=number_type(0, 1e6, "seconds"),
        default=0.0,
        metavar="S",
        help="seconds into --init-audio where reading starts (default: 0)",
    )
    group.add_argument(
        "--init-noise-level",
        type=number_type(MIN_NOISE, 1.0),
        metavar="X",
        help="initial sigma: 0.01 stays close to --init-audio, 1 ignores it",
    )
    group.add_argument(
        "--inpaint-range", type=_range, action="append", default=[], metavar="A,B",
        help="range of --init-audio in seconds to regenerate; repeat for several ranges",
    )  # fmt: skip
    group.add_argument("--paste-kept", action="store_true", help="restore the kept latent frames after every step")
    group.add_argument(
        "--out",
        type=Path,
        metavar="F",
        help="output file; the extension selects the format (default: output/<prompt>_<seed>.wav)",
    )
    group.add_argument(
        "--out-dir", type=Path, metavar="D", help="output folder; files are named <number>_<prompt>_<seed>.wav"
    )
    group.add_argument(
        "--format",
        choices=[suffix[1:] for suffix in audio_io.FORMATS],
        help="format of files without --out (default: wav)",
    )
    group.add_argument(
        "--bits",
        choices=tuple(audio_io.BITS),
        default="16",
        help="bits of a sample in WAV and FLAC (default: %(default)s)",
    )
    group.add_argument(
        "--peak",
        choices=audio_io.PEAKS,
        default="clip",
        help="treatment of samples beyond full scale (default: %(default)s)",
    )
    group.add_argument("--save-latents", type=Path, metavar="F.npz", help="also save latents, sigmas, seed and seconds")


def _shard(text: str) -> tuple[int, int]:
    """Return "2/8" as numbers."""
    first, _, count = text.partition("/")
    if not (first.isascii() and first.isdigit() and count.isascii() and count.isdigit() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N")
    if not 1 <= int(first) <= int(count):
        raise argparse.ArgumentTypeError(f"{text}: I is 1 to N")
    return int(first), int(count)


def _range(text: str) -> tuple[float, float]:
    """Return "1.5,4" as numbers."""
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers A,B") from None
    return start, end
