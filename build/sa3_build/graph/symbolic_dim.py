"""Symbolic lengths of axes: polynomials of symbols, like L + 64 or B * L."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Monomial = tuple[str, ...]  # the symbols that are multiplied, in order; () is the constant


@dataclass(frozen=True)
class Length:
    """Polynomial constant + sum of factor * product of symbols, in normal form: equal lengths compare equal."""

    constant: int
    terms: tuple[tuple[Monomial, int], ...] = ()

    def __add__(self, other: Length | int) -> Length:
        return self._plus(_length(other), 1)

    def __sub__(self, other: Length | int) -> Length:
        return self._plus(_length(other), -1)

    def __neg__(self) -> Length:
        return Length(0)._plus(self, -1)

    def times(self, other: Length | int) -> Length:
        """Return the product with a number or another length."""
        product: Counter[Monomial] = Counter()
        for names, count in self._factors():
            for other_names, factor in _length(other)._factors():
                product[tuple(sorted(names + other_names))] += count * factor
        return _normal(product)

    def over(self, divisor: Length | int) -> Length | None:
        """Return the quotient: rounded down for a number, exact for a length; None if it is not a length."""
        divided = _length(divisor)
        if divided.number is None:
            return self._exactly_over(divided)
        if divided.number == 0 or any(count % divided.number for _, count in self.terms):
            return None
        return _normal({name: count // divided.number for name, count in self._factors()})

    def at(self, symbol_name: str, size: int) -> Length:
        """Return the length with a symbol replaced by a number."""
        terms: Counter[Monomial] = Counter()
        for names, count in self._factors():
            rest = tuple(name for name in names if name != symbol_name)
            terms[rest] += count * size ** (len(names) - len(rest))
        return _normal(terms)

    def has(self, symbol_name: str) -> bool:
        """Return True when the length depends on a symbol."""
        return any(symbol_name in names for names, _ in self.terms)

    @property
    def symbols(self) -> frozenset[str]:
        """Symbols that the length depends on."""
        return frozenset(name for names, _ in self.terms for name in names)

    @property
    def number(self) -> int | None:
        """The length as a number, or None if it is symbolic."""
        return None if self.terms else self.constant

    def __str__(self) -> str:
        parts = ["*".join(names if count == 1 else (str(count), *names)) for names, count in self.terms]
        return "+".join([*parts, *([str(self.constant)] if self.constant or not parts else [])])

    def _factors(self) -> list[tuple[Monomial, int]]:
        return [*self.terms, ((), self.constant)]

    def _exactly_over(self, divisor: Length) -> Length | None:
        """Return the polynomial quotient, or None if there is a remainder."""
        (lead, factor), rest, quotient = divisor.terms[-1], self, Length(0)
        while rest.terms:
            names, count = rest.terms[-1]
            powers = Counter(names)
            powers.subtract(lead)
            if count % factor or min(powers.values()) < 0:
                return None
            step = _normal({tuple(sorted(powers.elements())): count // factor})
            quotient, rest = quotient + step, rest - divisor.times(step)
        return quotient if rest == Length(0) else None

    def _plus(self, other: Length, sign: int) -> Length:
        total = Counter(dict(self._factors()))
        for names, count in other._factors():
            total[names] += sign * count
        return _normal(total)


Shape = tuple[Length | None, ...]  # None: not known


def symbol(name: str) -> Length:
    """Return the length that is one symbol."""
    return Length(0, (((name,), 1),))


def broadcast(first: Length | None, second: Length | None) -> Length | None:
    """Return the broadcast of two axes, or None if it is unknown. Raises ValueError if they are incompatible."""
    if first == second or second == Length(1):
        return first
    if first == Length(1):
        return second
    for unknown, axis in ((first, second), (second, first)):
        if unknown is None and axis is not None:
            return axis if (axis.number or 0) > 1 else None  # a symbol may be 1; the unknown axis then decides
    raise ValueError(f"axes of {first} and {second} are incompatible")


def element_count(lengths: Sequence[Length | None]) -> Length | None:
    """Return the number of elements of a shape, or None when an axis is unknown."""
    total = Length(1)
    for length in lengths:
        if length is None:
            return None
        total = total.times(length)
    return total


def quotient(numerator_shape: Sequence[Length | None], denominator_shape: Sequence[Length | None]) -> Length | None:
    """Return element_count(numerator_shape) / element_count(denominator_shape), or None when it is not a length."""
    remaining, divisors = Counter(numerator_shape), []
    for part in denominator_shape:
        if remaining[part] > 0:  # an unknown axis cancels only against itself
            remaining[part] -= 1
        else:
            divisors.append(part)
    numerator, denominator = element_count(list(remaining.elements())), element_count(divisors)
    return None if numerator is None or denominator is None else numerator.over(denominator)


def _length(value: Length | int) -> Length:
    return value if isinstance(value, Length) else Length(int(value))


def _normal(terms: Mapping[Monomial, int]) -> Length:
    named = {names: count for names, count in terms.items() if names and count}
    # By degree, then by name: the last one is the leading term of a division.
    ordered = sorted(named.items(), key=lambda item: (len(item[0]), item[0]))
    return Length(terms.get((), 0), tuple(ordered))
