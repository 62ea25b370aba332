"""Compile named engines from ONNX: from --onnx-root or $SA3_ONNX_DIR, else from the hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sa3_trt_core import console, engines, paths, targets
from sa3_trt_core.cli.arguments import Parser, integer_type, run_command
from sa3_trt_core.errors import ToolError

EXITS = "Exit code: 0 all engines are there, 2 a mistake or an engine that failed, 3 a gate of --engine-report said no."
MOST_BUILDS = 20


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="build_from_onnx.py", description=__doc__, epilog=EXITS)
    line.add_argument("names", nargs="*", metavar="NAME", help="targets or groups; --list shows them")
    line.add_argument("--backend", choices=tuple(engines.BUILT), default=None, help="default: tensorrt if installed")
    line.add_argument("--arch", help="sm_89,sm_120 (default: this machine's GPU)")
    line.add_argument("--onnx-root", metavar="DIR", help=f"folder of ONNX files (default ${paths.ONNX_ROOT_VARIABLE})")
    line.add_argument("--revision", metavar="R", help="the hub's commit or branch, instead of the pinned one")
    line.add_argument("--offline", action="store_true", help="take the hub's files from its cache only")
    line.add_argument("--models-dir", type=Path, help="folder of engines (default models/)")
    line.add_argument("--list", action="store_true", help="show every target and leave")
    line.add_argument("--dry-run", action="store_true", help="show what would be built and leave; needs no GPU")
    line.add_argument(
        "--validate", action="store_true",
        help="then compare each DiT with its reference (scripts/validate_fp8.py), reports in MODELS/validation",
    )  # fmt: skip
    line.add_argument("--json", action="store_true", help="one JSON document on stdout")
    line.add_argument("--force", action="store_true", help="build even what is current")
    line.add_argument(
        "--best-of",
        type=integer_type(1, MOST_BUILDS),
        default=1,
        metavar="N",
        help="keep the fastest of N builds (GPU)",
    )
    line.add_argument("--engine-report", action="store_true", help="count FP8 products, fused attention, islands (GPU)")
    line.add_argument("--prebuilt", action="store_true", help="take the hub's engines where they are of this TensorRT")
    return line


def main(argv: list[str] | None = None) -> int:
    """List, plan or build."""
    args = parser().parse_args(argv)
    if args.list:
        return _list(args.json)
    if not args.names:
        raise ToolError("name at least one target", "--list shows them; sa3-m-fp8 is built by its own name only")
    chosen = targets.expand(args.names)
    backend = args.backend or engines.default_build().name
    arches = _arches(args.arch, backend, args.dry_run)
    place = paths.ModelSource.of(args.onnx_root, args.models_dir, args.revision, args.offline)
    plan = [
        (target, arch, engines.BACKENDS[backend].engine_path(place.models_dir, arch, target))
        for target in chosen
        for arch in arches
    ]
    if args.dry_run:
        return _show_plan(plan, backend, place.onnx_root, args.json)

    import validate_fp8

    from sa3_build.engines import build
    from sa3_build.recipes import validation

    dits = validation.require_dits(chosen) if args.validate else []
    options = build.Options(backend, place, args.force, args.best_of, args.engine_report, args.prebuilt)
    jobs = [build.Job(*one) for one in plan]
    build.require_possible(jobs, options)
    outcomes = build.build_all(jobs, options)
    documents = [outcome.as_dict for outcome in outcomes]
    print(json.dumps(documents, indent=2) if args.json else build.summary(outcomes))
    build.require_all(outcomes)
    for target in dits:
        out = validation.validate_target(validate_fp8.main, target, backend, arches, place)
        print(f"{target.name} validated: {out}", file=sys.stderr)
    return 0


def _arches(text: str | None, backend: str, plan_only: bool) -> list[str]:
    """Return the architectures of --arch, else this machine's; for a plan without a GPU, all that are known."""
    if text is not None:
        return paths.parse_arches(text)
    here = engines.BACKENDS[backend].arch_here()
    if here is None and plan_only:
        return list(paths.ARCHES)
    if here is None:
        raise ToolError(
            "no NVIDIA GPU is visible, so there is no default architecture", "give --arch, e.g. --arch sm_89"
        )
    return [here]


def _list(as_json: bool) -> int:
    if as_json:
        print(json.dumps([_described(target) for target in targets.TARGETS], indent=2))
        return 0
    rows = [[t.name, t.summary, ", ".join(t.groups) or "by its own name only", t.onnx[0]] for t in targets.TARGETS]
    print(console.table(("target", "what", "groups", "from"), rows))
    return 0


def _described(target: targets.Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "kind": target.kind,
        "precision": target.precision,
        "groups": list(target.groups),
        "opt_in": target.opt_in,
        "onnx": list(target.onnx),
        "summary": target.summary,
    }


def _graph_of(target: targets.Target, onnx_root: Path | None) -> str:
    """Return the name of a target's graph: the one that lies there, else each of the names that it may have."""
    from sa3_trt_core.hub import resolve

    found = resolve.local_onnx(onnx_root, target) if onnx_root is not None else None
    return " or ".join(target.onnx) if found is None or onnx_root is None else str(found.relative_to(onnx_root))


def _show_plan(
    plan: list[tuple[targets.Target, str, Path]], backend: str, onnx_root: Path | None, as_json: bool
) -> int:
    from sa3_build.engines import status

    source = str(onnx_root) if onnx_root else targets.HUB_REPOSITORY
    steps = [
        {
            "target": target.name,
            "arch": arch,
            "backend": backend,
            "from": f"{source}: {_graph_of(target, onnx_root)}",
            "to": str(out),
            "state": str(status.state_of_path(out, target, arch, backend, onnx_root)),
        }
        for target, arch, out in plan
    ]
    if as_json:
        print(json.dumps(steps, indent=2))
    else:
        print(console.table(tuple(steps[0]), [list(step.values()) for step in steps]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
