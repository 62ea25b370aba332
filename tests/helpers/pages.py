"""The project's Markdown pages: their fenced blocks, links, headings and code spans."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from helpers.commands import ROOT

DOCS = ROOT / "build" / "docs"
PAGES = sorted([
    *ROOT.glob("*.md"), *(ROOT / "build").glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "interface").rglob("*.md")
])  # fmt: skip
# The order in which a reader, and the test, goes through the commands: later ones use files of earlier ones.
READ_IN_ORDER = (
    ROOT / "README.md",
    ROOT / "build" / "README.md",
    *(DOCS / f"{name}.md" for name in ("generating", "producing", "engines", "validation", "serving")),
)
# Kinds of fenced blocks by their info string, and what a test does with each.
KINDS = {
    "sh": "run as it stands on the files of make demo",
    "python": "run as it stands on the files of make demo",
    "sh make": "planned by make --dry-run; make demo is run whole by its own test, make test is the run itself",
    "sh serve": "started as a server",
    "sh curl": "sent to that server",
    "sh gpu": "parsed; needs an NVIDIA GPU with TensorRT, and the gated files of the hub",
    "sh develop": "parsed; it installs packages, or is a part of the run itself",
    "text": "no command",
}
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    """A fenced block: its page, its info string and its text."""

    page: Path
    kind: str
    text: str


def blocks(kind: str | None = None) -> list[Block]:
    """Return the fenced blocks of one kind, or all, in reading order; pages outside that order come last."""
    order = [*READ_IN_ORDER, *(page for page in PAGES if page not in READ_IN_ORDER)]
    every = [Block(page, *match) for page in order for match in _FENCE.findall(page.read_text())]
    return [block for block in every if kind in (None, block.kind)]


def lines(kind: str) -> list[str]:
    """Return the command lines of all blocks of one kind, in reading order."""
    return [line for block in blocks(kind) for line in block.text.splitlines() if line.strip()]


def prose(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def links(page: Path) -> Iterator[str]:
    """Yield the target of each link and image of a page."""
    yield from _LINK.findall(_SPAN.sub("", prose(page)))


def spans(page: Path) -> Iterator[str]:
    """Yield each code span of a page; an escaped | of a table is a plain one."""
    yield from (span.replace("\\|", "|") for span in _SPAN.findall(prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    made: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        made.add(name if name not in made else f"{name}-1")
    return made


def parser_of(name: str) -> argparse.ArgumentParser | None:
    """Return the parser of a command of ours, None for another word."""
    if name == "sa3_serve":
        name = "sa3_serve.command"
    elif not any((ROOT / folder / f"{name}.py").is_file() for folder in ("build", "scripts")):
        return None
    made: argparse.ArgumentParser = __import__(name, fromlist=["make_parser"]).make_parser()
    return made
