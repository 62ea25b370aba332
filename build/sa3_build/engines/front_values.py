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
ENDLESS_SECONDS = 1e9  # beyond any longest duration
CLOSE = 1e-4  # relative


@dataclass(frozen=True)
class Duration:
    """Fourier features of the duration: their frequencies, whether these include 2 pi, and the longest duration (s)."""

    frequencies: np.ndarray
    angular: bool
    longest: float


def frequencies(run: PartialRun, model: ir.Model, input_name: str) -> np.ndarray:
    """Return the table of frequencies of an input's Fourier features, as stored."""
    _, tables = _angle(model, input_name)
    if len(tables) != 1:
        raise GraphNotRecognised(f"no unique table of frequencies of {input_name}")
    return tables[0].reshape(-1)


def duration_features(run: PartialRun, model: ir.Model) -> Duration:
    """Return the features of seconds_total, derived from the angles at one second and beyond the longest duration."""
    angle, _ = _angle(model, "seconds_total")
    table = frequencies(run, model, "seconds_total")
    seconds = next(value for value in model.graph.inputs if value.name == "seconds_total")
    first, last = (
        _run(run, angle, {seconds: np.full(1, seconds_value, np.float32)}).reshape(-1)[-1]
        for seconds_value in (1.0, ENDLESS_SECONDS)
    )
    longest, ratio = float(last / first), float(last / table[-1])
    for factor in (1.0, 2.0 * math.pi):
        if abs(ratio / factor - 1.0) < CLOSE:
            rounded = round(longest)
            return Duration(table, factor == 1.0, float(rounded) if abs(longest / rounded - 1.0) < CLOSE else longest)
    raise GraphNotRecognised(
        f"the angle of the longest duration is {ratio:.6g} times its frequency (expected: 1 or 2 pi times)",
        "export it with seconds_total clamped to the longest duration and divided by it",
    )


def padding(run: PartialRun, model: ir.Model) -> np.ndarray:
    """Return the embedding of a masked text position: the cross token of a row with text and a zero mask."""
    tokens = cross_tokens(model)
    if tokens is None:
        raise GraphNotRecognised("no linear layer reads the cross tokens")
    inputs = {str(value.name): value for value in model.graph.inputs}
    embeddings = _run(run, tokens, {
        inputs["t5_hidden"]: np.ones((1, TEXT_TOKENS, TEXT_CHANNELS), np.float32),
        inputs["t5_mask"]: np.zeros((1, TEXT_TOKENS), np.float32), inputs["seconds_total"]: np.ones(1, np.float32),
    })  # fmt: skip
    embeddings = embeddings.reshape(-1, TEXT_CHANNELS)[:TEXT_TOKENS]
    if not np.array_equal(embeddings, np.broadcast_to(embeddings[:1], embeddings.shape)):
        raise GraphNotRecognised("no unique embedding of padded text positions")
    return embeddings[0]


def _angle(model: ir.Model, input_name: str) -> tuple[ir.Value, list[np.ndarray]]:
    """Return the input of the first cosine of an input's features, and the constant tables that it depends on."""
    dependencies = query.input_dependencies(model)
    waves = [node for node in model.graph if node.op_type == "Cos" and dependencies[node] == {input_name}]
    if not waves or waves[0].inputs[0] is None:
        raise GraphNotRecognised(f"no Fourier features of {input_name}")
    upstream = query.ancestors([waves[0].inputs[0]])
    tables = [value for node in upstream for value in constants(node) if value.size > 1 and value.dtype.kind == "f"]
    return waves[0].inputs[0], tables


def _run(run: PartialRun, value: ir.Value, feeds: dict[ir.Value, np.ndarray]) -> np.ndarray:
    try:
        return run.run([value], feeds, FRAMES)[0]
    except NotComputable as reason:
        raise GraphNotRecognised(f"{value.name} cannot be computed: {reason}") from None
