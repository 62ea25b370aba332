"""Build menu: show the state of every engine on this machine and build the missing ones."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sa3_build.engines import status
from sa3_trt_core import console, engines, paths, targets
from sa3_trt_core.cli.arguments import Parser, run_command
from sa3_trt_core.errors import ToolError

States = list[tuple[targets.Target, dict[str, status.State]]]  # by backend; the first is the one to build for


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="build.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="list every target with its state and exit")
    parser.add_argument("--missing", action="store_true", help="build every missing engine except opt-in targets")
    parser.add_argument(
        "--backend",
        choices=tuple(engines.BUILT),
        default=None,
        help="backend to build for (default: tensorrt if installed)",
    )
    parser.add_argument("--arch", help="architecture, e.g. sm_89 (default: this machine's GPU)")
    parser.add_argument(
        "--onnx-root", metavar="DIR", help=f"folder of ONNX files (default: ${paths.ONNX_ROOT_VARIABLE})"
    )
    parser.add_argument("--models-dir", type=Path, help="folder of engines (default: models/)")
    parser.add_argument("--json", action="store_true", help="with --list: print one JSON document")
    return parser


def main(argv: list[str] | None = None) -> int:
    """List the engines, build the missing ones, or show the menu."""
    args = make_parser().parse_args(argv)
    models = args.models_dir or paths.default_models_dir()
    backend = engines.BACKENDS[args.backend] if args.backend else engines.default_build()
    shown = (
        [backend] if args.backend else [backend, *(other for other in engines.BUILT.values() if other is not backend)]
    )
    arch_option = paths.parse_arches(args.arch)[0] if args.arch else None
    arch = arch_option or backend.arch_here()
    onnx_root = paths.onnx_root_from(args.onnx_root)
    states = [
        (t, {b.name: status.state_of(t, models, arch_option or b.arch_here(), b.name, onnx_root) for b in shown})
        for t in targets.TARGETS
    ]
    if args.list or not (args.missing or sys.stdin.isatty()):
        return _list(states, f"{models}/{arch or '-'}", args.json)
    if arch is None:
        raise ToolError("no NVIDIA GPU found, so --arch has no default", "give --arch, e.g. --arch sm_89")
    done = (status.CURRENT, status.NO_ENGINE)
    missing = [
        target for target, by_backend in states if not target.opt_in and by_backend[backend.name].name not in done
    ]
    chosen = missing if args.missing else _ask(states, missing)
    if not chosen:
        print("nothing to build")
        return 0

    import build_from_onnx

    build_argv = [target.name for target in chosen] + [
        "--backend",
        backend.name,
        "--arch",
        arch,
        "--models-dir",
        str(models),
    ]
    return build_from_onnx.main([*build_argv, *(["--onnx-root", args.onnx_root] if args.onnx_root else [])])


def _list(states: States, folder: str, as_json: bool) -> int:
    if as_json:
        entries = [
            {
                "name": target.name, "opt_in": target.opt_in, **_document(next(iter(by_backend.values()))),
                "engines": {name: _document(state) for name, state in by_backend.items()},
            }
            for target, by_backend in states
        ]  # fmt: skip
        print(json.dumps(entries, indent=2))
    else:
        rows = [[t.name, t.summary, _text(s) + (" (opt-in)" if t.opt_in else ""), _size(s)] for t, s in states]
        print(console.table(("target", "what", f"state in {folder}", "size"), rows))
    return 0


def _document(state: status.State) -> dict[str, Any]:
    return {"state": state.name, "reason": state.reason, "bytes": state.bytes}


def _text(by_backend: dict[str, status.State]) -> str:
    """Return the state for the backend to build for, then the states of other backends' engines, if any."""
    first, *others = by_backend.items()
    return "; ".join([str(first[1]), *(f"{name} {state}" for name, state in others if state.bytes)])


def _size(by_backend: dict[str, status.State]) -> str:
    size = sum(state.bytes for state in by_backend.values())
    return console.format_bytes(size) if size else "-"


def _ask(states: States, missing: list[targets.Target]) -> list[targets.Target]:
    """Print the menu and return the chosen targets; opt-in targets are chosen only by their own number."""
    for number, (target, by_backend) in enumerate(states, 1):
        print(f"{number:3}  {target.name:<20} {target.summary:<38} {_text(by_backend)} {_size(by_backend)}")
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
