"""The table of calibration kinds: each record adds rows, a help line and a line in the documentation."""

from __future__ import annotations

import re
from collections import defaultdict

from helpers.commands import ROOT
from sa3_build.calibration.plan import Generation, generations
from sa3_trt_core.artifacts.calibration_kinds import EXTRA, KINDS, TABLE, TURNS

SECONDS = (54.0, 10.0, 120.0)


def test_every_kind_takes_its_turn_and_varies_what_its_record_says() -> None:
    turns: dict[str, list[Generation]] = defaultdict(list)
    for index, (text, extra) in enumerate(generations(4 * len(TURNS), SECONDS, 7, "deployment")):
        assert (text.kind, text.prompt, text.seed, text.spans, text.sigma_max, text.cfg) == (
            KINDS[0], index, 7 + index, (), 1.0, 1.0
        )  # fmt: skip
        assert extra.seconds == text.seconds and extra.seed != text.seed
        turns[extra.kind].append(extra)
    assert list(turns) == [kind.name for kind in TURNS]
    for kind in TURNS:
        planned = turns[kind.name]
        assert [generation.spans for generation in planned] == [kind.spans[turn % len(kind.spans)] for turn in range(4)]
        assert [generation.sigma_max for generation in planned] == [
            kind.sigma_max[turn % len(kind.sigma_max)] for turn in range(4)
        ]
        assert [generation.cfg for generation in planned] == [kind.cfg[turn % len(kind.cfg)] for turn in range(4)]
        assert [generation.seconds for generation in planned] == [54.0, 10.0, 120.0, 54.0]


def test_no_kind_is_the_text_again() -> None:
    """A record that varies nothing would repeat the rows of the prompts' own texts."""
    for kind in TURNS:
        assert any(len(values) > 1 for values in (kind.spans, kind.sigma_max, kind.cfg)), kind.name
    assert TABLE[0].spans == ((),) and TABLE[0].sigma_max == TABLE[0].cfg == (1.0,)


def test_every_kind_is_documented_in_its_order() -> None:
    text = (ROOT / "build/docs/producing.md").read_text()
    table = text[text.index("| kind | rows |") :].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == KINDS
    assert all(kind.about in EXTRA for kind in TURNS)
