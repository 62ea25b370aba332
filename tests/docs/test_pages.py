"""The pages agree with the repository: links, anchors, commands, flags, messages, packages, figures."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.commands import ROOT
from helpers.pages import DOCS, KINDS, PAGES, READ_IN_ORDER, anchors, blocks, lines, links, parser_of, prose, spans

README, ARCHITECTURE, TROUBLES = ROOT / "README.md", DOCS / "architecture.md", DOCS / "troubleshooting.md"
SOURCES = sorted(file for folder in ("build", "scripts", "interface") for file in (ROOT / folder).rglob("*.py"))
SECTIONS = ("Install", "Generate", "Python", "Engines", "Many sounds", "Producing", "Figures", "Limits")
READERS = ("generating", "producing", "engines", "validation", "serving", "architecture", "troubleshooting")
WORD = re.compile(r"[A-Za-z][A-Za-z' -]{5,}")


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    wrong = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(link)
    assert wrong == []


def test_no_page_is_out_of_reach_of_the_readme() -> None:
    reached, queue = {README}, [README]
    while queue:
        page = queue.pop()
        for link in links(page):
            file = (page.parent / link.partition("#")[0]).resolve()
            if file.suffix == ".md" and "://" not in link and file not in reached:
                reached.add(file)
                queue.append(file)
    assert {label(page) for page in PAGES} - {label(page) for page in reached} == set()


def test_the_readme_has_its_sections_in_order_and_a_first_screen() -> None:
    text = README.read_text()
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == SECTIONS
    first = text[: text.index("\n## ")]
    assert first.count("![") == 1 and first.count("```sh") == 1 and len(re.findall(r"^\|---", first, re.MULTILINE)) == 1
    assert len(lines("sh make")) == 2 and len(text.splitlines()) <= 180


def test_there_is_a_page_for_every_reader() -> None:
    door = set(links(ROOT / "build" / "README.md"))
    assert {f"docs/{name}.md" for name in READERS} <= door
    assert {page.stem for page in DOCS.glob("*.md")} == set(READERS)


def test_every_fenced_block_is_of_a_kind_that_a_test_knows() -> None:
    assert {block.kind for block in blocks()} == set(KINDS)
    assert all(block.page in READ_IN_ORDER for block in blocks("sh")), "commands of other pages are not run"
    for page in PAGES:
        assert page.read_text().count("\n```") == 2 * sum(block.page == page for block in blocks()), label(page)


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Every code span of a page that begins with a command of ours: its module and its words."""
    for span in spans(page):
        try:
            words = shlex.split(span)
        except ValueError:
            continue
        words = words[1:] if words[:1] == ["python"] else words
        name = words[0].rpartition("/")[2].removesuffix(".py") if words else ""
        if words and (words[0].endswith(".py") or name in ("sa3_trt", "sa3_serve")) and parser_of(name):
            yield name, words[1:]


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return every flag of a parser and of its subcommands."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            flags |= set().union(*(flags_of(subparser) for subparser in action.choices.values()))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_flag_of_a_quoted_command_exists(page: Path) -> None:
    for name, words in commands(page):
        parser = parser_of(name)
        assert parser is not None
        used = {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", word)}
        assert used <= flags_of(parser), f"{name}: {used - flags_of(parser)}"


@pytest.mark.parametrize("page", [*READ_IN_ORDER, TROUBLES], ids=label)
def test_every_flag_alone_is_one_of_some_command(page: Path) -> None:
    names = {file.stem for folder in ("build", "scripts") for file in (ROOT / folder).glob("*.py")}
    known = set().union(*(flags_of(parser) for name in [*names, "sa3_serve"] if (parser := parser_of(name))))
    used = {flag for span in spans(page) if span.startswith("--") for flag in re.findall(r"--[a-z][a-z0-9-]*", span)}
    assert used - known == set()


@pytest.mark.parametrize("name", ["sa3_trt", "sa3_serve"])
def test_every_flag_of_the_users_commands_is_explained(name: str) -> None:
    parser = parser_of(name)
    assert parser is not None
    explained = {flag for page in ("generating", "serving") for span in spans(DOCS / f"{page}.md")
                 for flag in re.findall(r"--[a-z][a-z0-9-]*", span)}  # fmt: skip
    assert {flag for flag in flags_of(parser) if flag.startswith("--")} - explained - {"--help"} == set()


def texts(file: Path) -> str:
    """Return the string literals of a source file; each formatted value is replaced by an ellipsis."""
    literals = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            literals.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            literals.append(node.value)
    return "\n".join(literals)


def test_every_message_of_the_troubleshooting_page_is_in_the_code() -> None:
    written = "\n".join(texts(file) for file in SOURCES)
    cells = re.findall(r"^\| (`.*?) \|", TROUBLES.read_text(), re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) >= 40
    missing = {message: part for message in messages for part in WORD.findall(message) if part.strip() not in written}
    assert missing == {}


def test_every_package_has_a_row_in_the_architecture() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \|", ARCHITECTURE.read_text(), re.MULTILINE)
    there = {label(file.parent) for file in SOURCES if file.name == "__init__.py"} - {"build/sa3_build"}
    assert set(rows) == there and len(rows) == len(there)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in ("NOTES", "CHANGELOG")], ids=label)
def test_every_source_file_that_a_page_names_exists(page: Path) -> None:
    """By a path from the page, the root or a package's parent, or by name alone. Dated pages name files of before."""
    parents = (page.parent, ROOT, ROOT / "build", ROOT / "scripts", ROOT / "build/sa3_build", ROOT / "tests/fault",
               ROOT / "tests/docs", ROOT / "scripts/sa3_trt_core")  # fmt: skip
    names = {file.name for file in SOURCES}
    for span in spans(page):
        for word in span.split():
            if re.fullmatch(r"[\w./]+\.py", word):
                there = any((parent / word).is_file() for parent in parents)
                assert there or word in names or word.endswith("NAME.py"), word


def test_every_page_and_section_that_the_code_cites_exists() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.toml")]
    wrong, cited = [], 0
    for file in files:
        for name, section in re.findall(
            r"\b((?:build|interface)/[\w/]+\.md)(?:, ([A-Z]\w+(?: \w+)?))?", file.read_text()
        ):
            page, cited = ROOT / name, cited + 1
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE) if page.is_file() else []
            if not page.is_file() or (section and not any(f"{section} ".startswith(f"{title} ") for title in titles)):
                wrong.append(f"{label(file)}: {name} {section}")
    assert wrong == [] and cited > 20


def test_every_figure_of_the_readme_is_in_a_dated_note() -> None:
    """A figure that was measured again is changed in NOTES.md or the model card first."""
    measured = (ROOT / "build/NOTES.md").read_text() + (ROOT / "interface/demo_model/README.md").read_text()
    text = re.sub(r"<!-- matrix -->.*?<!-- /matrix -->", "", README.read_text(), flags=re.DOTALL)
    rows = [row for row in re.findall(r"^\|.*\|$", text, re.MULTILINE) if not row.startswith("|---")]
    figures = {figure for row in rows for figure in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", row)}
    assert len(figures) > 20
    assert {figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured)} == set()


def test_the_notes_have_a_table_of_their_contents() -> None:
    text = (ROOT / "build/NOTES.md").read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    contents = text[: text.index("\n## ")]
    assert [title for title in titles if f"[{title}](#" not in contents] == []


def test_the_door_is_a_page_long() -> None:
    assert len((ROOT / "build/README.md").read_text().splitlines()) <= 80
    assert "|" in prose(ROOT / "build/README.md")
