"""Inspect a LoRA adapter of Stable Audio 3: kind, rank, layers, trigger words, and size of its change."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sa3_trt_core.cli.arguments import Parser, run_command


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="sa3_lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info")
    info = commands.add_parser("info", help="print the contents of a file, and its parts without effect")
    info.add_argument("file", type=Path, metavar="F", help=".safetensors file or PEFT folder")
    info.add_argument(
        "--weights",
        type=Path,
        metavar="model.safetensors",
        help="native checkpoint: also print the relative norm of each change",
    )
    info.add_argument("--lora-partial", action="store_true", help="skip layers of other networks, with a note")
    info.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the contents of an adapter."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core.lora import info
    from sa3_trt_core.lora.adapter import read_adapter

    adapter = read_adapter(args.file, args.lora_partial)
    document = info.describe(adapter)
    if args.weights is not None:
        document["changes"] = info.changes(adapter, args.weights)
    print(json.dumps(document, indent=2) if args.json else _text(document))
    return 0


def _text(document: dict[str, Any]) -> str:
    """Return the document as lines of text."""
    from sa3_trt_core.console import table

    ranks, scales = ("/".join(f"{value:g}" for value in document[name]) for name in ("ranks", "scales"))
    alpha = "not stated" if document["alpha"] is None else f"{document['alpha']:g}"
    rows = [
        ["file", document["file"]],
        ["kind", f"{document['kind']} ({document['naming']} names, settings: {document['settings_from'] or 'none'})"],
        ["rank", f"{ranks}, alpha {alpha}, scale {scales}"],
        ["layers", f"{document['layers']} in {document['blocks']} blocks and outside"],
        ["trigger words", "; ".join(document["trigger_words"]) or "none stated"],
    ]
    lines = [table(("what", "value"), rows)]
    changes = document.get("changes")
    header = ("layer", "count") if changes is None else ("layer", "|dW| / |W|")
    body = document["by_layer"].items() if changes is None else ((k, f"{v:.4f}") for k, v in changes.items())
    lines.append(table(header, [[name, str(value)] for name, value in body]))
    lines += [f"note: {note}" for note in document["notes"]]
    return "\n".join(lines)


def entry() -> None:
    """Run as a console command."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
