"""Limits on figures of the validation report (gates), read from a TOML file."""

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
MAX_BYTES = 1 << 20
DEFAULTS = "gates.toml"
_KEYS = {"figure", "at_least", "at_most", "optional", "why"}


@dataclass(frozen=True)
class Gate:
    """One limit: `figure` is a path into the report, its parts separated by dots; `*` stands for any part.

    `optional`: a report without such a figure passes. `why` is appended to the message of a failure.
    """

    figure: str
    at_least: float = -math.inf
    at_most: float = math.inf
    optional: bool = False
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """Result of one gate on one figure; `value` is None where the report has null or no such figure."""

    figure: str
    value: float | None
    at_least: float | None
    at_most: float | None
    passed: bool
    line: str


def read_gates(path: Path | None) -> list[Gate]:
    """Read the gates of a file, or the shipped ones. Raises ToolError that names the defect of the file."""
    try:
        if path is None:
            text = resources.files(__package__).joinpath(DEFAULTS).read_text("utf-8")
        else:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise _wrong(path, f"is larger than {MAX_BYTES} bytes")
            text = data.decode("utf-8-sig")
        document = tomllib.loads(text)
    except OSError as error:
        raise _wrong(path, f"cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _wrong(path, f"is not TOML ({error})") from None
    if document.get("format") != FORMAT:
        raise _wrong(path, f"has format {document.get('format')!r}, not {FORMAT}")
    unknown = sorted(document.keys() - {"format", "gate"})
    entries = document.get("gate", [])
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
    """Apply every gate to every figure that its path matches, in order. A figure that is null or absent fails."""
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
    required = [f">= {gate.at_least:g}"] if gate.at_least > -math.inf else []
    required += [f"<= {gate.at_most:g}"] if gate.at_most < math.inf else []
    shown = "not in the report" if number is None else f"{number:.6g}"
    line = f"{'PASS' if passed else 'FAIL'} {name}: {shown} (required {' and '.join(required)})"
    low, high = (limit if math.isfinite(limit) else None for limit in (gate.at_least, gate.at_most))
    return Verdict(name, number, low, high, passed, line if passed or not gate.why else f"{line}: {gate.why}")


def _figures(value: Any, parts: Sequence[str], above: str) -> Iterator[tuple[str, Any]]:
    """Yield every figure under a path with its full name; entries of a list are named by their index."""
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


def _wrong(path: Path | None, defect: str) -> ToolError:
    return ToolError(f"the gate file {path or DEFAULTS} {defect}", "see scripts/sa3_validation/gates.toml")
