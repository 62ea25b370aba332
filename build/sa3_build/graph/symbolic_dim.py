"""How long an axis is when it is not a number yet: whole multiples of symbols plus a constant, like L + 64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Length:
    """constant + sum of factor * symbol, in a normal form: equal lengths compare equal."""

    constant: int
    terms: tuple[tuple[str, int], ...] = ()

    def __add__(self, other: Length | int) -> Length:
        return self._plus(_length(other), 1)

    def __sub__(self, other: Length | int) -> Length:
        return self._plus(_length(other), -1)

    def __neg__(self) -> Length:
        return Length(0)._plus(self, -1)

    def times(self, factor: int) -> Length:
        """This length, `factor` times."""
        return _normal(self.constant * factor, {name: count * factor for name, count in self.terms})

    def over(self, divisor: int) -> Length | None:
        """The quotient rounded down, or None when it is no whole multiple of the symbols."""
        if any(count % divisor for _, count in self.terms):
            return None
        return _normal(self.constant // divisor, {name: count // divisor for name, count in self.terms})

    @property
    def number(self) -> int | None:
        """The length as a number, when it is one."""
        return None if self.terms else self.constant

    def __str__(self) -> str:
        parts = [name if count == 1 else f"{count}*{name}" for name, count in self.terms]
        return "+".join([*parts, *([str(self.constant)] if self.constant or not parts else [])])

    def _plus(self, other: Length, sign: int) -> Length:
        terms = Counter(dict(self.terms))
        for name, count in other.terms:
            terms[name] += sign * count
        return _normal(self.constant + sign * other.constant, terms)


Shape = tuple[Length | None, ...]  # None: not known


def symbol(name: str) -> Length:
    """A length that is one symbol."""
    return Length(0, ((name, 1),))


def broadcast(first: Length | None, second: Length | None) -> Length | None:
    """The axis of a sum of two tensors with these axes; None when it is not known. Raises ValueError if none fits."""
    if first == second or second == Length(1):
        return first
    if first == Length(1):
        return second
    for one, other in ((first, second), (second, first)):
        if one is None and other is not None:
            return other if (other.number or 0) > 1 else None  # a symbol may be 1, and then the other one counts
    raise ValueError(f"axes of {first} and {second} do not go together")


def quotient(whole: Sequence[Length | None], parts: Sequence[Length | None]) -> Length | None:
    """Product of `whole` over product of `parts`, or None when that is no single length."""
    left, number = Counter(whole), 1
    for part in parts:
        if left[part] > 0:
            left[part] -= 1
        elif part is None or part.number is None:
            return None
        else:
            number *= part.number
    rest = [length for length in left.elements() if length != Length(1)]
    if None in rest:
        return None
    open_ones = [length for length in rest if length is not None and length.number is None]
    total = 1
    for length in rest:
        total *= length.number or 1 if length is not None else 1
    if len(open_ones) > 1 or number == 0:
        return None
    return (open_ones[0].times(total) if open_ones else Length(total)).over(number)


def _length(value: Length | int) -> Length:
    return value if isinstance(value, Length) else Length(int(value))


def _normal(constant: int, terms: Mapping[str, int]) -> Length:
    return Length(constant, tuple(sorted((name, count) for name, count in terms.items() if count)))
