"""Write a small native-format Stable Audio 3 checkpoint: the trained demonstration model, or seeded random weights."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.cli.arguments import Parser, integer_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_demo.text_encoder import DemoSize

RANDOM_DEFAULTS = {"geometry": "small", "width": 256, "depth": 3}


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="make_demo_checkpoint.py", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; an existing demo checkpoint is replaced"
    )
    parser.add_argument("--random", action="store_true", help="write random weights instead of interface/demo_model")
    parser.add_argument(
        "--seed", type=integer_type(0, 2**31 - 1), default=0, help="seed of random weights (default: 0)"
    )
    parser.add_argument(
        "--geometry", choices=("small", "medium"),
        help="with --random: small (default) uses --width and --depth; medium has SA3-medium's sizes (9 GB)",
    )  # fmt: skip
    parser.add_argument(
        "--width",
        type=integer_type(128, 1536),
        help="with --random: embed_dim, a multiple of 64, 128..1536 (default: 256)",
    )
    parser.add_argument(
        "--depth", type=integer_type(1, 24), help="with --random: number of DiT layers, 1..24 (default: 3)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the checkpoint and its manifest."""
    args = make_parser().parse_args(argv)
    settings = _settings(args)
    out: Path = args.out.resolve()
    marker = out / "model_config.json"
    _require_folder(out)

    import reprompt
    from sa3_trt_core.artifacts import files, locks
    from sa3_trt_core.artifacts.build import build

    shipped = Path(reprompt.__file__).with_name("demo_model")
    inputs = {} if args.random else _digests(shipped)
    with build(marker, "demo_checkpoint", inputs, settings, lock=locks.lock_path(out)) as draft:
        if draft is None:
            print(f"{out} is current")
            return 0

        from sa3_demo import checkpoint as demo, ship

        with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp", dir=out.parent) as scratch:
            folder = Path(scratch) / out.name
            folder.mkdir()
            if args.random:
                size = _random_size(settings)
                demo.write_demo_checkpoint(folder, size, args.seed, reprompt.calibration_prompts())
            else:
                size = ship.write_checkpoint(shipped, folder, args.seed)
            draft.finish([folder / "model_config.json", folder / "model.safetensors"])
            files.replace_folder(folder, out)
    weights = f"random weights, seed {args.seed}" if args.random else "trained weights of interface/demo_model"
    print(f"{out}: {weights}, width {size.embed_dim}, depth {size.depth}")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(args, name) for name in RANDOM_DEFAULTS if getattr(args, name) is not None}
    if not args.random:
        if options:
            raise ToolError(
                f"--{next(iter(options))} requires --random", "the trained weights have a fixed size: add --random"
            )
        return {"seed": args.seed}
    settings = {**RANDOM_DEFAULTS, **options}
    if settings["width"] % 64:
        raise ToolError(
            f"--width {settings['width']} is not a multiple of 64", "heads have 64 channels: use 128, 192, 256, ..."
        )
    return {"random": True, "seed": args.seed, **settings}


def _random_size(settings: dict[str, Any]) -> DemoSize:
    from sa3_demo import checkpoint as demo

    if settings["geometry"] == "medium":
        return demo.MEDIUM
    width = settings["width"]
    return demo.DemoSize(embed_dim=width, depth=settings["depth"], num_heads=width // 64)


def _digests(shipped: Path) -> dict[str, str]:
    from sa3_demo import ship
    from sa3_trt_core.artifacts import files

    ship.require_shipped(shipped)
    return {file.name: files.sha256_of(file) for file in ship.shipped_files(shipped)}


def _require_folder(out: Path) -> None:
    """Raise ToolError for a folder with other content than a demo checkpoint."""
    from sa3_trt_core.artifacts import files, manifest

    files.require_writable(out / "model_config.json", "checkpoint")
    if out.is_dir() and any(out.iterdir()) and not manifest.manifest_path(out / "model_config.json").is_file():
        raise ToolError(f"{out} exists and is not a demo checkpoint", "choose a new folder")


if __name__ == "__main__":
    sys.exit(run_command(main))
