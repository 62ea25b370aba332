"""The build menu: what is built on this machine, what is missing, and building it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sa3_trt_core import console, device, manifest, paths, targets
from sa3_trt_core.errors import Parser, ToolError, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="build.py", description=__doc__)
    line.add_argument("--list", action="store_true", help="show every target and its state, and leave")
    line.add_argument("--missing", action="store_true", help="build all that is missing (opt-in targets are left out)")
    line.add_argument(
        "--backend", choices=device.TENSORRT_BACKENDS, default=None, help="default: tensorrt if installed"
    )
    line.add_argument("--arch", help="one architecture, e.g. sm_89 (default: this machine's GPU)")
    line.add_argument("--onnx-root", metavar="DIR", help=f"folder of ONNX files (default ${paths.ONNX_ROOT_VARIABLE})")
    line.add_argument("--models-dir", type=Path, help="folder of engines (default models/)")
    line.add_argument("--json", action="store_true", help="with --list: one JSON document")
    return line


def main(argv: list[str] | None = None) -> int:
    """List, build what is missing, or ask."""
    args = parser().parse_args(argv)
    models = args.models_dir or paths.default_models_dir()
    backend = args.backend or ("tensorrt" if device.tensorrt_module("tensorrt") else "tensorrt_rtx")
    arch = paths.parse_arches(args.arch)[0] if args.arch else device.current_arch()
    if args.list or not (args.missing or sys.stdin.isatty()):
        return _list(models, arch, backend, args.json)
    if arch is None:
        raise ToolError(
            "no NVIDIA GPU is visible, so there is no default architecture", "give --arch, e.g. --arch sm_89"
        )
    missing = [t for t in targets.missing_candidates() if state_of(t, models, arch, backend)[0] != "current"]
    chosen = missing if args.missing else _ask(models, arch, backend, missing)
    if not chosen:
        print("nothing to build")
        return 0

    import build_from_onnx

    line = [target.name for target in chosen] + ["--backend", backend, "--arch", arch, "--models-dir", str(models)]
    return build_from_onnx.main([*line, *(["--onnx-root", args.onnx_root] if args.onnx_root else [])])


def state_of(target: targets.Target, models: Path, arch: str | None, backend: str) -> tuple[str, str]:
    """The state of one engine ("missing", "current" or "stale: why") and its size."""
    if arch is None:
        return "no GPU", "-"
    path = paths.engine_path(models, arch, target, backend)
    if not path.is_file():
        return "missing", "-"
    try:
        reason = manifest.verify_manifest(path)
    except ToolError as error:
        reason = error.message
    return f"stale: {reason}" if reason else "current", console.format_bytes(path.stat().st_size)


def _list(models: Path, arch: str | None, backend: str, as_json: bool) -> int:
    states = [(target, *state_of(target, models, arch, backend)) for target in targets.TARGETS]
    if as_json:
        print(json.dumps([{"name": t.name, "state": s, "opt_in": t.opt_in, "size": z} for t, s, z in states], indent=2))
    else:
        rows = [[t.name, t.summary, s + (" (opt-in)" if t.opt_in else ""), z] for t, s, z in states]
        print(console.table(("target", "what", f"state in {models}/{arch or '-'}", "size"), rows))
    return 0


def _ask(models: Path, arch: str, backend: str, missing: list[targets.Target]) -> list[targets.Target]:
    """The menu. Opt-in targets have their own number and are in no other choice."""
    for number, target in enumerate(targets.TARGETS, 1):
        state, size = state_of(target, models, arch, backend)
        print(f"{number:3}  {target.name:<20} {target.summary:<38} {state} {size}")
    print(f"  m  build all missing ({len(missing)})\n  q  quit")
    try:
        answer = input("> ").strip().lower()
    except EOFError:
        answer = "q"
    if answer in ("", "q"):
        return []
    if answer == "m":
        return missing
    if not answer.isdigit() or not 1 <= int(answer) <= len(targets.TARGETS):
        raise ToolError(f"no such choice: {answer}", f"a number from 1 to {len(targets.TARGETS)}, m or q")
    return [targets.TARGETS[int(answer) - 1]]


if __name__ == "__main__":
    sys.exit(run_command(main))
