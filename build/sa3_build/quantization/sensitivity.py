"""Which products must stay in 16 bits for a target: measured effects, a greedy order, measured combinations.

Cost in forwards of the switchable DiT, for P parity rows, S sigmas, K kinds of product, U units and M combinations
tried: 2 P + (K S + U) + M S + P. At full size (P 16, S 8, K 9, U 148, M about 8): 330, fewer than the pass that
measures amax needs for its 448 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sa3_build.graph import io as graph_io
from sa3_build.quantization import layer_roles, pareto, round_weights, selection as quantization_selection
from sa3_build.quantization.layer_roles import Place
from sa3_build.quantization.pareto import Effect, Point
from sa3_build.quantization.switchable_graph import SwitchableDit
from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, Row
from sa3_trt_core.console import Progress, table
from sa3_trt_core.errors import GateError
from sa3_validation import distances

# The parity gate runs one session without branches, which rounds less to 16 bits: 2.5 % of the distance was seen.
AIM = 0.95  # of the distance 1 - target is what the search goes for


@dataclass(frozen=True)
class Outcome:
    """Which products stay in 16 bits, the frontier as JSON, and what it cost."""

    kept: tuple[str, ...]
    frontier: dict[str, Any]
    forwards: int


@dataclass(frozen=True)
class _Probe:
    """A row that combinations are tried on, and its latent with nothing quantised."""

    sigma: float
    row: Row
    reference: np.ndarray


class Sensitivity:
    """One search on one DiT. The rows are those of the parity gate, so that what is found here passes there."""

    def __init__(self, dit: SwitchableDit, places: dict[str, Place], rows: CalibrationSet, macs_elsewhere: int) -> None:
        """`places` is by product; `macs_elsewhere` are the multiply-adds of a token that are never in FP8."""
        self._dit, self._places, self._rows = dit, places, rows
        self._macs_elsewhere = macs_elsewhere
        self._references: list[np.ndarray] = []
        self._probes: list[_Probe] = []

    def search(self, target: float, most_products: int | None, weights: str) -> Outcome:
        """Keep the fewest units for which no row is under `target`. Raises GateError with the frontier if none will do.

        Combinations are tried on the row that is worst at each sigma when all is quantised; the one that is chosen is
        run on every row, and a row that it fails joins those that are tried.
        """
        self._run_references()
        worst = self._choose_probes()
        order = pareto.greedy_order(self._effects(min(worst, key=lambda sigma: worst[sigma])))
        points = pareto.predicted_points(order, self._macs_elsewhere, weights)
        points[0] = replace(points[0], measured=worst)
        last = max(p.kept for p in points if most_products is None or p.products <= most_products)
        chosen = 0
        while min(self._measure(order, points, chosen).values()) < target:
            found = self._fewest(order, points, target, chosen, last)
            if found is None:
                raise self._not_reached(points, target, most_products)
            chosen = found
            points[chosen] = replace(points[chosen], measured=self._run_all(order, chosen, target))
            if min(self._measure(order, points, chosen).values()) < target:  # more probes: measure the rest again
                points[chosen + 1 :] = [replace(point, measured=None) for point in points[chosen + 1 :]]
        kept = tuple(product.node for effect in order[:chosen] for product in effect.unit.products)
        return Outcome(kept, pareto.document(order, points, target, chosen), self._dit.forwards)

    def _run_references(self) -> None:
        nothing = [False] * len(self._dit.units)
        with Progress("sensitivity: reference", self._rows.rows) as progress:
            for row in self._rows:
                self._references.append(self._dit.denoised(row, nothing).astype(np.float32))
                progress.advance()

    def _choose_probes(self) -> dict[float, float]:
        """The worst row of each sigma with everything in FP8; returns the worst cosine by sigma."""
        worst: dict[float, tuple[float, _Probe]] = {}
        everything = [True] * len(self._dit.units)
        with Progress("sensitivity: everything in FP8", self._rows.rows) as progress:
            for row, reference in zip(self._rows, self._references, strict=True):
                probe = _Probe(round(float(row["t"][0]), 6), row, reference)
                cosine = distances.cosine(reference.astype(np.float64), self._dit.denoised(row, everything))
                if probe.sigma not in worst or not cosine >= worst[probe.sigma][0]:
                    worst[probe.sigma] = cosine, probe
                progress.advance()
        self._probes = [worst[sigma][1] for sigma in sorted(worst, reverse=True)]
        return {sigma: worst[sigma][0] for sigma in sorted(worst, reverse=True)}

    def _effects(self, worst_sigma: float) -> list[Effect]:
        """Every unit's own error: measured at the worst sigma, carried to the others as its whole kind's error goes.

        Each kind is measured at every sigma, each unit at one: K S + U forwards where U S would be hours more.
        """
        units = self._dit.units
        places = [self._places[unit.products[0].node] for unit in units]
        kinds = sorted({place.kind for place in places})
        squared: dict[str, dict[float, float]] = {}
        with Progress("sensitivity: own effects", len(kinds) * len(self._probes) + len(units), "forwards") as progress:
            for kind in kinds:
                some = [place.kind == kind for place in places]
                squared[kind] = {probe.sigma: self._squared_error(probe, some) for probe in self._probes}
                progress.advance(len(self._probes))
            at_worst = next(probe for probe in self._probes if probe.sigma == worst_sigma)
            effects = []
            for index, (unit, place) in enumerate(zip(units, places, strict=True)):
                own = self._squared_error(at_worst, [other == index for other in range(len(units))])
                of_kind = squared[place.kind]
                carried = own / of_kind[worst_sigma] if of_kind[worst_sigma] else 0.0
                effects.append(
                    Effect(unit, place.kind, place.layer, {sigma: carried * e for sigma, e in of_kind.items()})
                )
                progress.advance()
        return effects

    def _squared_error(self, probe: _Probe, quantised: Sequence[bool]) -> float:
        found = self._dit.denoised(probe.row, quantised)
        return distances.relative(probe.reference.astype(np.float64), found) ** 2

    def _fewest(
        self, order: Sequence[Effect], points: list[Point], target: float, failed: int, last: int
    ) -> int | None:
        """The fewest units, more than `failed`, that hold the target on the probes; bisected, first where predicted."""
        low, high = failed, last + 1
        guess = next((point.kept for point in points if point.predicted >= target), last)
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            holds = min(self._measure(order, points, middle).values()) >= target
            low, high = (low, middle) if holds else (middle, high)
            guess = (low + high) // 2
        return high if high <= last else None

    def _measure(self, order: Sequence[Effect], points: list[Point], kept: int) -> dict[float, float]:
        """The worst cosine by sigma of one point on the probes; measured once."""
        measured = points[kept].measured
        if measured is None:
            quantised = self._configuration(order, kept)
            found: dict[float, float] = {}
            with Progress(f"sensitivity: {points[kept].products} products in 16 bits", len(self._probes)) as progress:
                for probe in self._probes:
                    latent = self._dit.denoised(probe.row, quantised)
                    cosine = distances.cosine(probe.reference.astype(np.float64), latent)
                    found[probe.sigma] = min(cosine, found.get(probe.sigma, cosine))
                    progress.advance()
            points[kept] = replace(points[kept], measured=found)
            return found
        return dict(measured)

    def _run_all(self, order: Sequence[Effect], kept: int, target: float) -> dict[float, float]:
        """The worst cosine by sigma on every row; rows under the target become probes."""
        quantised = self._configuration(order, kept)
        found: dict[float, float] = {}
        with Progress("sensitivity: every row", self._rows.rows) as progress:
            for row, reference in zip(self._rows, self._references, strict=True):
                sigma = round(float(row["t"][0]), 6)
                cosine = distances.cosine(reference.astype(np.float64), self._dit.denoised(row, quantised))
                found[sigma] = min(cosine, found.get(sigma, cosine))
                if cosine < target:
                    self._probes.append(_Probe(sigma, row, reference))
                progress.advance()
        return found

    def _configuration(self, order: Sequence[Effect], kept: int) -> list[bool]:
        out = {effect.unit.activation for effect in order[:kept]}
        return [unit.activation not in out for unit in self._dit.units]

    def _not_reached(self, points: Sequence[Point], target: float, most_products: int | None) -> GateError:
        limit = "with one product left in FP8" if most_products is None else f"with {most_products} products in 16 bits"
        return GateError(
            f"the target cosine {target:g} is not reached {limit}; nothing was written",
            "give a lower --target-cosine" + ("" if most_products is None else " or a higher --max-fp16-products"),
            table(pareto.HEADER, pareto.table_rows(points)),
        )


def search(build: Workspace) -> Mapping[str, Any]:
    """Find the products that must stay in 16 bits for the target cosine of the settings.

    Raises GateError, with the frontier, when the target is out of reach.
    """
    settings, target = build.settings, build.settings.target_cosine
    assert target is not None
    model = graph_io.load(build.clean)
    selection = quantization_selection.select_products(model)
    found_places = layer_roles.places(model, selection)
    aim = 1 - AIM * (1 - target)
    amax = np.load(build.amax)
    with SwitchableDit(build.clean, selection, amax, settings.headroom, round_weights.codes_of(build)) as dit:
        found = Sensitivity(dit, found_places, build.parity_rows, selection.token_macs_elsewhere)
        outcome = found.search(aim, settings.max_fp16_products, settings.weights)
    return {
        "kept": list(outcome.kept),
        "frontier": {**outcome.frontier, "target": target, "aim": aim},
        "forwards": outcome.forwards,
    }
