"""Search for the layers that must stay in 16 bits for a target cosine: measured effects, greedy order, bisection.

Cost in forwards of the switchable DiT, for P parity rows, S sigmas, K roles of layer, U quantizer groups and M
configurations tried: 2 P + (K S + U) + M S + P. At full size (P 16, S 8, K 9, U 148, M about 8): 330, fewer than the
amax pass needs for its 448 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sa3_build.graph import io as graph_io
from sa3_build.quantization import layer_roles, pareto, round_weights, selection as quantization_selection
from sa3_build.quantization.layer_roles import LayerRole
from sa3_build.quantization.pareto import Effect, Point
from sa3_build.quantization.switchable_graph import SwitchableDit
from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, Row
from sa3_trt_core.console import Progress, table
from sa3_trt_core.errors import GateError
from sa3_validation import distances

# The parity check runs a graph without branches, which rounds less to 16 bits: 1 - cosine differed by up to 2.5 %.
AIM = 0.95  # the search requires 1 - cosine <= AIM * (1 - target)


@dataclass(frozen=True)
class SearchResult:
    """The layers that stay in 16 bits, the frontier as JSON, and the number of forwards."""

    kept: tuple[str, ...]
    frontier: dict[str, Any]
    forwards: int


@dataclass(frozen=True)
class _Probe:
    """A row that configurations are tried on, and its denoised latent without quantisation."""

    sigma: float
    row: Row
    reference: np.ndarray


class Sensitivity:
    """One search on one DiT. The rows are those of the parity check, so that its result passes there."""

    def __init__(
        self, dit: SwitchableDit, roles: dict[str, LayerRole], rows: CalibrationSet, macs_elsewhere: int
    ) -> None:
        """`roles` is by node name; `macs_elsewhere` counts a token's multiply-adds that are never in FP8."""
        self._dit, self._roles, self._rows = dit, roles, rows
        self._macs_elsewhere = macs_elsewhere
        self._references: list[np.ndarray] = []
        self._probes: list[_Probe] = []

    def search(self, target: float, max_linears: int | None, weights: str) -> SearchResult:
        """Return the fewest groups to keep in 16 bits such that no row is under `target`.

        Configurations are tried on the row of each sigma that is worst when everything is quantised. The chosen one is
        run on every row; rows under the target are added to those tried. Raises GateError with the frontier if no
        configuration reaches the target.
        """
        self._run_references()
        worst = self._choose_probes()
        order = pareto.greedy_order(self._effects(min(worst, key=lambda sigma: worst[sigma])))
        points = pareto.predicted_points(order, self._macs_elsewhere, weights)
        points[0] = replace(points[0], measured=worst)
        last = max(p.kept for p in points if max_linears is None or p.fp16_linears <= max_linears)
        chosen = 0
        while min(self._measure(order, points, chosen).values()) < target:
            candidate = self._fewest(order, points, target, chosen, last)
            if candidate is None:
                raise self._not_reached(points, target, max_linears)
            chosen = candidate
            points[chosen] = replace(points[chosen], measured=self._run_all(order, chosen, target))
            if min(self._measure(order, points, chosen).values()) < target:  # more probes: measure the rest again
                points[chosen + 1 :] = [replace(point, measured=None) for point in points[chosen + 1 :]]
        kept = tuple(linear.node for effect in order[:chosen] for linear in effect.group.linears)
        return SearchResult(kept, pareto.document(order, points, target, chosen), self._dit.forwards)

    def _run_references(self) -> None:
        none_quantised = [False] * len(self._dit.groups)
        with Progress("sensitivity: reference", self._rows.rows) as progress:
            for row in self._rows:
                self._references.append(self._dit.denoised(row, none_quantised).astype(np.float32))
                progress.advance()

    def _choose_probes(self) -> dict[float, float]:
        """Set the probes to the worst row of each sigma with everything in FP8; return the worst cosine by sigma."""
        worst: dict[float, tuple[float, _Probe]] = {}
        all_quantised = [True] * len(self._dit.groups)
        with Progress("sensitivity: everything in FP8", self._rows.rows) as progress:
            for row, reference in zip(self._rows, self._references, strict=True):
                probe = _Probe(round(float(row["t"][0]), 6), row, reference)
                cosine = distances.cosine(reference.astype(np.float64), self._dit.denoised(row, all_quantised))
                if probe.sigma not in worst or not cosine >= worst[probe.sigma][0]:
                    worst[probe.sigma] = cosine, probe
                progress.advance()
        self._probes = [worst[sigma][1] for sigma in sorted(worst, reverse=True)]
        return {sigma: worst[sigma][0] for sigma in sorted(worst, reverse=True)}

    def _effects(self, worst_sigma: float) -> list[Effect]:
        """Return every group's own error: measured at the worst sigma, scaled to the others like its role's error.

        Each role is measured at every sigma, each group at one: K S + U forwards instead of U S, which would take hours
        more.
        """
        groups = self._dit.groups
        roles = [self._roles[group.linears[0].node] for group in groups]
        kinds = sorted({role.kind for role in roles})
        squared: dict[str, dict[float, float]] = {}
        with Progress("sensitivity: own effects", len(kinds) * len(self._probes) + len(groups), "forwards") as progress:
            for kind in kinds:
                quantised = [role.kind == kind for role in roles]
                squared[kind] = {probe.sigma: self._squared_error(probe, quantised) for probe in self._probes}
                progress.advance(len(self._probes))
            at_worst = next(probe for probe in self._probes if probe.sigma == worst_sigma)
            effects = []
            for index, (group, role) in enumerate(zip(groups, roles, strict=True)):
                own = self._squared_error(at_worst, [position == index for position in range(len(groups))])
                of_kind = squared[role.kind]
                carried = own / of_kind[worst_sigma] if of_kind[worst_sigma] else 0.0
                effects.append(
                    Effect(group, role.kind, role.layer, {sigma: carried * e for sigma, e in of_kind.items()})
                )
                progress.advance()
        return effects

    def _squared_error(self, probe: _Probe, quantised: Sequence[bool]) -> float:
        denoised = self._dit.denoised(probe.row, quantised)
        return distances.relative(probe.reference.astype(np.float64), denoised) ** 2

    def _fewest(
        self, order: Sequence[Effect], points: list[Point], target: float, failed: int, last: int
    ) -> int | None:
        """Return the smallest number of groups above `failed` that reaches the target on the probes, by bisection.

        Starts at the predicted number. None if `last` is not enough.
        """
        low, high = failed, last + 1
        guess = next((point.kept for point in points if point.predicted >= target), last)
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            holds = min(self._measure(order, points, middle).values()) >= target
            low, high = (low, middle) if holds else (middle, high)
            guess = (low + high) // 2
        return high if high <= last else None

    def _measure(self, order: Sequence[Effect], points: list[Point], kept: int) -> dict[float, float]:
        """Return the worst cosine by sigma of one point on the probes; measured once."""
        measured = points[kept].measured
        if measured is None:
            quantised = self._configuration(order, kept)
            worst_by_sigma: dict[float, float] = {}
            with Progress(f"sensitivity: {points[kept].fp16_linears} layers in 16 bits", len(self._probes)) as progress:
                for probe in self._probes:
                    latent = self._dit.denoised(probe.row, quantised)
                    cosine = distances.cosine(probe.reference.astype(np.float64), latent)
                    worst_by_sigma[probe.sigma] = min(cosine, worst_by_sigma.get(probe.sigma, cosine))
                    progress.advance()
            points[kept] = replace(points[kept], measured=worst_by_sigma)
            return worst_by_sigma
        return dict(measured)

    def _run_all(self, order: Sequence[Effect], kept: int, target: float) -> dict[float, float]:
        """Return the worst cosine by sigma over every row; rows under the target become probes."""
        quantised = self._configuration(order, kept)
        worst_by_sigma: dict[float, float] = {}
        with Progress("sensitivity: every row", self._rows.rows) as progress:
            for row, reference in zip(self._rows, self._references, strict=True):
                sigma = round(float(row["t"][0]), 6)
                cosine = distances.cosine(reference.astype(np.float64), self._dit.denoised(row, quantised))
                worst_by_sigma[sigma] = min(cosine, worst_by_sigma.get(sigma, cosine))
                if cosine < target:
                    self._probes.append(_Probe(sigma, row, reference))
                progress.advance()
        return worst_by_sigma

    def _configuration(self, order: Sequence[Effect], kept: int) -> list[bool]:
        kept_activations = {effect.group.activation for effect in order[:kept]}
        return [group.activation not in kept_activations for group in self._dit.groups]

    def _not_reached(self, points: Sequence[Point], target: float, max_linears: int | None) -> GateError:
        limit = "with one layer left in FP8" if max_linears is None else f"with {max_linears} layers in 16 bits"
        return GateError(
            f"target cosine {target:g} not reached {limit}; nothing was written",
            "give a lower --target-cosine" + ("" if max_linears is None else " or a higher --max-fp16-linears"),
            table(pareto.HEADER, pareto.table_rows(points)),
        )


def search(build: Workspace) -> Mapping[str, Any]:
    """Return the layers that must stay in 16 bits for the target cosine of the settings.

    Raises GateError, with the frontier, when the target is out of reach.
    """
    settings, target = build.settings, build.settings.target_cosine
    assert target is not None
    model = graph_io.load(build.clean)
    selection = quantization_selection.select_linears(model)
    roles = layer_roles.roles_of(model, selection)
    aim = 1 - AIM * (1 - target)
    amax = np.load(build.amax)
    with SwitchableDit(build.clean, selection, amax, settings.headroom, round_weights.codes_of(build)) as dit:
        sensitivity = Sensitivity(dit, roles, build.parity_rows, selection.token_macs_elsewhere)
        outcome = sensitivity.search(aim, settings.max_fp16_products, settings.weights)
    return {
        "kept": list(outcome.kept),
        "frontier": {**outcome.frontier, "target": target, "aim": aim},
        "forwards": outcome.forwards,
    }
