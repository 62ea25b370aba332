"""Compile engines from ONNX files in --onnx-root or $SA3_ONNX_DIR, otherwise from the hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sa3_trt_core import console, engines, paths, targets
from sa3_trt_core.cli.arguments import Parser, integer_type, run_command
from sa3_trt_core.errors import ToolError

EXITS = "Exit code: 0 all engines are built, 2 usage error or failed build, 3 failed gate."
MAX_BUILDS = 20


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="build_from_onnx.py", description=__doc__, epilog=EXITS)
    parser.add_argument("names", nargs="*", metavar="NAME", help="targets or groups (see --list)")
    parser.add_argument(
        "--backend",
        choices=tuple(engines.BUILT),
        default=None,
        help="backend to build for (default: tensorrt if installed)",
    )
    parser.add_argument("--arch", help="architectures, e.g. sm_89,sm_120 (default: this machine's GPU)")
    parser.add_argument(
        "--onnx-root", metavar="DIR", help=f"folder of ONNX files (default: ${paths.ONNX_ROOT_VARIABLE})"
    )
    parser.add_argument("--revision", metavar="R", help="commit or branch on the hub (default: the pinned commit)")
    parser.add_argument("--offline", action="store_true", help="use hub files from the local cache only")
    parser.add_argument("--models-dir", type=Path, help="folder of engines (default: models/)")
    parser.add_argument("--list", action="store_true", help="list every target and exit")
    parser.add_argument("--dry-run", action="store_true", help="print what would be built and exit; needs no GPU")
    parser.add_argument(
        "--validate", action="store_true",
        help="then compare each DiT with its reference (scripts/validate_fp8.py); reports in MODELS/validation",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--force", action="store_true", help="rebuild engines that are current")
    parser.add_argument(
        "--best-of",
        type=integer_type(1, MAX_BUILDS),
        default=1,
        metavar="N",
        help=f"build N times and keep the fastest, 1..{MAX_BUILDS} (default: 1; needs a GPU)",
    )
    parser.add_argument(
        "--engine-report",
        action="store_true",
        help="print counts of FP8 GEMMs, fused attention and fp32 layers (needs a GPU)",
    )
    parser.add_argument(
        "--refittable",
        action="store_true",
        help="build TensorRT DiTs that `sa3_trt --lora F --refit` can change (needs a GPU)",
    )
    parser.add_argument(
        "--prebuilt", action="store_true", help="download prebuilt engines if their TensorRT version matches"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """List the targets, print the plan, or build the engines."""
    args = make_parser().parse_args(argv)
    if args.list:
        return _list(args.json)
    if not args.names:
        raise ToolError("no target named", "see --list; sa3-m-fp8 is built only by its own name")
    chosen = targets.expand(args.names)
    backend = args.backend or engines.default_build().name
    arches = _arches(args.arch, backend, args.dry_run)
    source = paths.ModelSource.of(args.onnx_root, args.models_dir, args.revision, args.offline)
    plan = [
        (target, arch, engines.BACKENDS[backend].engine_path(source.models_dir, arch, target))
        for target in chosen
        for arch in arches
    ]
    if args.dry_run:
        return _show_plan(plan, backend, source.onnx_root, args.json, args.refittable)

    import validate_fp8

    from sa3_build.engines import build
    from sa3_build.recipes import validation

    dits = validation.require_dits(chosen) if args.validate else []
    options = build.BuildOptions(
        backend, source, args.force, args.best_of, args.engine_report, args.prebuilt, args.refittable
    )
    jobs = [build.BuildJob(*entry) for entry in plan]
    build.require_possible(jobs, options)
    outcomes = build.build_all(jobs, options)
    documents = [outcome.as_dict for outcome in outcomes]
    print(json.dumps(documents, indent=2) if args.json else build.summary(outcomes))
    build.require_all(outcomes)
    for target in dits:
        out = validation.validate_target(validate_fp8.main, target, backend, arches, source)
        print(f"{target.name} validated: {out}", file=sys.stderr)
    return 0


def _arches(text: str | None, backend: str, plan_only: bool) -> list[str]:
    """Return the architectures of --arch, else this machine's; for a plan without a GPU, all known ones."""
    if text is not None:
        return paths.parse_arches(text)
    here = engines.BACKENDS[backend].arch_here()
    if here is None and plan_only:
        return list(paths.ARCHES)
    if here is None:
        raise ToolError("no NVIDIA GPU found, so --arch has no default", "give --arch, e.g. --arch sm_89")
    return [here]


def _list(as_json: bool) -> int:
    if as_json:
        print(json.dumps([_described(target) for target in targets.TARGETS], indent=2))
        return 0
    rows = [[t.name, t.summary, ", ".join(t.groups) or "only by its own name", t.onnx[0]] for t in targets.TARGETS]
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
    """Return the name of a target's graph: the existing file, else all names that it may have."""
    from sa3_trt_core.hub import resolve

    graph = resolve.local_onnx(onnx_root, target) if onnx_root is not None else None
    return " or ".join(target.onnx) if graph is None or onnx_root is None else str(graph.relative_to(onnx_root))


def _show_plan(
    plan: list[tuple[targets.Target, str, Path]], backend: str, onnx_root: Path | None, as_json: bool, refits: bool
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
            "state": str(status.state_of_path(out, target, arch, backend, onnx_root, refits)),
            **({"refittable": "yes"} if refits else {}),
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
