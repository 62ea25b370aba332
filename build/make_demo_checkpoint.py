"""Make a small native-format Stable Audio 3 checkpoint with seeded random weights, for demos and tests."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from sa3_trt_core.errors import Parser, ToolError, integer_type, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="make_demo_checkpoint.py", description=__doc__)
    line.add_argument("--out", type=Path, required=True, help="folder to write (replaced if it is a demo checkpoint)")
    line.add_argument("--seed", type=integer_type(0, 2**31 - 1), default=0, help="of all weights (default 0)")
    line.add_argument(
        "--geometry", choices=("small", "medium"), default="small",
        help="medium: SA3-medium's own sizes, 9 GB; --width and --depth are for small (default small)",
    )  # fmt: skip
    line.add_argument("--width", type=integer_type(128, 1536), default=256, help="embed_dim, a multiple of 64")
    line.add_argument("--depth", type=integer_type(1, 24), default=3, help="DiT layers (default 3)")
    return line


def main(argv: list[str] | None = None) -> int:
    """Write the checkpoint and its manifest."""
    args = parser().parse_args(argv)
    if args.width % 64:
        raise ToolError(
            f"--width {args.width} is not a multiple of 64", "heads have 64 channels: use 128, 192, 256, ..."
        )
    out: Path = args.out.resolve()
    marker = out / "model_config.json"
    _require_folder(out)
    settings = {"geometry": args.geometry, "seed": args.seed, "width": args.width, "depth": args.depth}

    from sa3_trt_core import manifest

    if manifest.is_current(marker, {}, settings)[0]:
        print(f"{out} is current")
        return 0

    import reprompt
    from sa3_build import demo_checkpoint as demo

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        small = demo.DemoSize(embed_dim=args.width, depth=args.depth, num_heads=args.width // 64)
        size = demo.MEDIUM if args.geometry == "medium" else small
        demo.write_demo_checkpoint(folder, size, args.seed, reprompt.calibration_prompts())
        written = [folder / "model_config.json", folder / "model.safetensors"]
        manifest.write_manifest(folder / marker.name, "demo_checkpoint", written, {}, settings)
        demo.replace_folder(folder, out)
    print(f"{out}: random weights, width {size.embed_dim}, depth {size.depth}, seed {args.seed}")
    return 0


def _require_folder(out: Path) -> None:
    """A folder that holds anything but a demo checkpoint is not ours to replace."""
    from sa3_trt_core import files, manifest

    files.require_writable(out / "model_config.json", "checkpoint")
    if out.is_dir() and any(out.iterdir()) and not manifest.manifest_path(out / "model_config.json").is_file():
        raise ToolError(f"{out} exists and holds no demo checkpoint", "name a new folder")


if __name__ == "__main__":
    sys.exit(run_command(main))
