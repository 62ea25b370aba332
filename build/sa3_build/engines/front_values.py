"""Read what a DiT computes before its blocks by running that part: frequencies, longest duration, padding embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sa3_build.engines.pack_weights import constants
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.graph.partial_run import NotComputable, PartialRun
from sa3_build.passes.null_row import cross_tokens
from sa3_trt_core.shapes import TEXT_CHANNELS, TEXT_TOKENS

FRAMES = 4
ENDLESS = 1e9  # seconds
CLOSE = 1e-4  # relative


@dataclass(frozen=True)
class Duration:
    """Fourier features of the duration: their frequencies, whether these hold 2 pi, and the longest duration (s)."""

    frequencies: np.ndarray
    angular: bool
    longest: float


def frequencies(run: PartialRun, model: ir.Model, given: str) -> np.ndarray:
    """Return the one table of frequencies behind the cosine of an input's features, as stored."""
    _, tables = _angle(model, given)
    if len(tables) != 1:
        raise GraphNotRecognised(f"no one table of frequencies of {given}")
    return tables[0].reshape(-1)


def duration_features(run: PartialRun, model: ir.Model) -> Duration:
    """Return the features of seconds_total, from the angles of one second and of more than there can be."""
    angle, _ = _angle(model, "seconds_total")
    table = frequencies(run, model, "seconds_total")
    seconds = next(value for value in model.graph.inputs if value.name == "seconds_total")
    one, most = (_run(run, angle, {seconds: np.full(1, at, np.float32)}).reshape(-1)[-1] for at in (1.0, ENDLESS))
    longest, whole = float(most / one), float(most / table[-1])
    for factor in (1.0, 2.0 * math.pi):
        if abs(whole / factor - 1.0) < CLOSE:
            near = round(longest)
            return Duration(table, factor == 1.0, float(near) if abs(longest / near - 1.0) < CLOSE else longest)
    raise GraphNotRecognised(
        f"the angle of the longest duration is {whole:.6g} times its frequency, neither 1 nor 2 pi times",
        "export it with seconds_total clamped to the longest duration and divided by it",
    )


def padding(run: PartialRun, model: ir.Model) -> np.ndarray:
    """Return the embedding of a masked text position: the cross token of a row with text and no mask."""
    tokens = cross_tokens(model)
    if tokens is None:
        raise GraphNotRecognised("no product was found that reads the cross tokens")
    inputs = {str(value.name): value for value in model.graph.inputs}
    found = _run(run, tokens, {
        inputs["t5_hidden"]: np.ones((1, TEXT_TOKENS, TEXT_CHANNELS), np.float32),
        inputs["t5_mask"]: np.zeros((1, TEXT_TOKENS), np.float32), inputs["seconds_total"]: np.ones(1, np.float32),
    })  # fmt: skip
    found = found.reshape(-1, TEXT_CHANNELS)[:TEXT_TOKENS]
    if not np.array_equal(found, np.broadcast_to(found[:1], found.shape)):
        raise GraphNotRecognised("no one embedding of padded text positions")
    return found[0]


def _angle(model: ir.Model, given: str) -> tuple[ir.Value, list[np.ndarray]]:
    """What the first cosine of an input's features reads, and the tables that it is made of."""
    behind = query.input_dependencies(model)
    waves = [node for node in model.graph if node.op_type == "Cos" and behind[node] == {given}]
    if not waves or waves[0].inputs[0] is None:
        raise GraphNotRecognised(f"no Fourier features of {given} were found")
    above = query.ancestors([waves[0].inputs[0]])
    tables = [value for node in above for value in constants(node) if value.size > 1 and value.dtype.kind == "f"]
    return waves[0].inputs[0], tables


def _run(run: PartialRun, wanted: ir.Value, given: dict[ir.Value, np.ndarray]) -> np.ndarray:
    try:
        return run.run([wanted], given, FRAMES)[0]
    except NotComputable as why:
        raise GraphNotRecognised(f"{wanted.name} cannot be computed: {why}") from None
