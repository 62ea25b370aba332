"""Represent the length of an axis that is not a number yet: a polynomial of symbols, like L + 64 or B * L."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Monomial = tuple[str, ...]  # the symbols that are multiplied, in order; () is the constant


@dataclass(frozen=True)
class Length:
    """constant + sum of factor * product of symbols, in a normal form: equal lengths compare equal."""

    constant: int
    terms: tuple[tuple[Monomial, int], ...] = ()

    def __add__(self, other: Length | int) -> Length:
        return self._plus(_length(other), 1)

    def __sub__(self, other: Length | int) -> Length:
        return self._plus(_length(other), -1)

    def __neg__(self) -> Length:
        return Length(0)._plus(self, -1)

    def times(self, other: Length | int) -> Length:
        """The product with a number or another length."""
        product: Counter[Monomial] = Counter()
        for mine, count in self._factors():
            for theirs, factor in _length(other)._factors():
                product[tuple(sorted(mine + theirs))] += count * factor
        return _normal(product)

    def over(self, divisor: Length | int) -> Length | None:
        """The quotient: rounded down by a number, exact by a length; None when it is no length of this kind."""
        divided = _length(divisor)
        if divided.number is None:
            return self._exactly_over(divided)
        if divided.number == 0 or any(count % divided.number for _, count in self.terms):
            return None
        return _normal({name: count // divided.number for name, count in self._factors()})

    def at(self, symbol_name: str, size: int) -> Length:
        """The length when a symbol is a number."""
        found: Counter[Monomial] = Counter()
        for names, count in self._factors():
            rest = tuple(name for name in names if name != symbol_name)
            found[rest] += count * size ** (len(names) - len(rest))
        return _normal(found)

    def has(self, symbol_name: str) -> bool:
        """True when the length depends on a symbol."""
        return any(symbol_name in names for names, _ in self.terms)

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols that the length depends on."""
        return frozenset(name for names, _ in self.terms for name in names)

    @property
    def number(self) -> int | None:
        """The length as a number, when it is one."""
        return None if self.terms else self.constant

    def __str__(self) -> str:
        parts = ["*".join(names if count == 1 else (str(count), *names)) for names, count in self.terms]
        return "+".join([*parts, *([str(self.constant)] if self.constant or not parts else [])])

    def _factors(self) -> list[tuple[Monomial, int]]:
        return [*self.terms, ((), self.constant)]

    def _exactly_over(self, divisor: Length) -> Length | None:
        """Division of polynomials by their leading terms, as long as nothing is left."""
        (lead, factor), rest, found = divisor.terms[-1], self, Length(0)
        while rest.terms:
            names, count = rest.terms[-1]
            left = Counter(names)
            left.subtract(lead)
            if count % factor or min(left.values()) < 0:
                return None
            step = _normal({tuple(sorted(left.elements())): count // factor})
            found, rest = found + step, rest - divisor.times(step)
        return found if rest == Length(0) else None

    def _plus(self, other: Length, sign: int) -> Length:
        total = Counter(dict(self._factors()))
        for names, count in other._factors():
            total[names] += sign * count
        return _normal(total)


Shape = tuple[Length | None, ...]  # None: not known


def symbol(name: str) -> Length:
    """A length that is one symbol."""
    return Length(0, (((name,), 1),))


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


def product(lengths: Sequence[Length | None]) -> Length | None:
    """The number of elements of a shape; None when an axis is not known."""
    total = Length(1)
    for length in lengths:
        if length is None:
            return None
        total = total.times(length)
    return total


def quotient(whole: Sequence[Length | None], parts: Sequence[Length | None]) -> Length | None:
    """Product of `whole` over product of `parts`, or None when that is no single length."""
    left, open_parts = Counter(whole), []
    for part in parts:
        if left[part] > 0:  # an axis that is not known cancels against nothing but itself
            left[part] -= 1
        else:
            open_parts.append(part)
    over, under = product(list(left.elements())), product(open_parts)
    return None if over is None or under is None else over.over(under)


def _length(value: Length | int) -> Length:
    return value if isinstance(value, Length) else Length(int(value))


def _normal(terms: Mapping[Monomial, int]) -> Length:
    named = {names: count for names, count in terms.items() if names and count}
    # By degree, then by name: the last one is the leading term of a division.
    ordered = sorted(named.items(), key=lambda item: (len(item[0]), item[0]))
    return Length(terms.get((), 0), tuple(ordered))
