"""What a candidate owes its reference: limits on figures of the report, from a TOML file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sa3_trt_core.errors import ToolError

FORMAT = 1
LARGEST = 1 << 20  # bytes
DEFAULTS = "gates.toml"
_KEYS = {"figure", "at_least", "at_most", "optional", "why"}


@dataclass(frozen=True)
class Gate:
    """One limit: `figure` is a path into the report, its parts separated by dots; `*` stands for any part.

    `optional`: a report without such a figure passes. `why` is told when it fails.
    """

    figure: str
    at_least: float = -math.inf
    at_most: float = math.inf
    optional: bool = False
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """What one gate said of one figure; `value` is None where the report has null or nothing there."""

    figure: str
    value: float | None
    at_least: float | None
    at_most: float | None
    passed: bool
    line: str


def read_gates(path: Path | None) -> list[Gate]:
    """The gates of a file, or the shipped ones. Raises ToolError naming what is wrong with the file."""
    try:
        if path is None:
            text = resources.files(__package__).joinpath(DEFAULTS).read_text("utf-8")
        else:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
            if len(data) > LARGEST:
                raise _wrong(path, f"is larger than {LARGEST} bytes")
            text = data.decode("utf-8-sig")
        found = tomllib.loads(text)
    except OSError as error:
        raise _wrong(path, f"cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong(path, f"is not TOML ({error})") from None
    if found.get("format") != FORMAT:
        raise _wrong(path, f"has format {found.get('format')!r}, not {FORMAT}")
    unknown = sorted(found.keys() - {"format", "gate"})
    entries = found.get("gate", [])
    if unknown or not isinstance(entries, list) or not entries:
        raise _wrong(path, f"has {unknown[0]!r}" if unknown else "has no [[gate]]")
    return [_gate(path, number, entry) for number, entry in enumerate(entries, 1)]


def _gate(path: Path | None, number: int, entry: Any) -> Gate:
    if not isinstance(entry, dict) or not isinstance(entry.get("figure"), str):
        raise _wrong(path, f"gate {number} names no figure")
    unknown = sorted(entry.keys() - _KEYS)
    if unknown:
        raise _wrong(path, f"gate {number} has {unknown[0]!r}")
    limits = {key: entry[key] for key in ("at_least", "at_most") if key in entry}
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in limits.values())
    if not limits or not numbers:
        raise _wrong(path, f"gate {number} ({entry['figure']}) has no limit that is a number")
    if not isinstance(entry.get("optional", False), bool) or not isinstance(entry.get("why", ""), str):
        raise _wrong(path, f"gate {number} ({entry['figure']}): optional is true or false, why is text")
    return Gate(**entry)


def judge(report: Mapping[str, Any], gates: Sequence[Gate]) -> list[Verdict]:
    """Every gate on every figure that its path fits, in order. A figure that is null, or not there, fails."""
    verdicts = []
    for gate in gates:
        fits = list(_figures(report, gate.figure.split("."), ""))
        if not fits and not gate.optional:
            fits = [(gate.figure, None)]
        verdicts += [_verdict(gate, name, value) for name, value in fits]
    return verdicts


def _verdict(gate: Gate, name: str, value: Any) -> Verdict:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    passed = number is not None and gate.at_least <= number <= gate.at_most
    owed = [f"at least {gate.at_least:g}"] if gate.at_least > -math.inf else []
    owed += [f"at most {gate.at_most:g}"] if gate.at_most < math.inf else []
    shown = "not in the report" if number is None else f"{number:.6g}"
    line = f"{'passes' if passed else 'FAILS'}: {name} is {shown}, owed {' and '.join(owed)}"
    low, high = (limit if math.isfinite(limit) else None for limit in (gate.at_least, gate.at_most))
    return Verdict(name, number, low, high, passed, line if passed or not gate.why else f"{line} ({gate.why})")


def _figures(value: Any, parts: Sequence[str], above: str) -> Iterator[tuple[str, Any]]:
    """Every figure under a path, with its name in full; an entry of a list goes by its number."""
    if not parts:
        yield above.removesuffix("."), value
        return
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = [(str(number), item) for number, item in enumerate(value)]
    else:
        return
    for key, item in entries:
        if parts[0] in ("*", key):
            yield from _figures(item, parts[1:], f"{above}{key}.")


def _wrong(path: Path | None, what: str) -> ToolError:
    return ToolError(f"the gate file {path or DEFAULTS} {what}", "see scripts/sa3_validation/gates.toml")
