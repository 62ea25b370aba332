"""The proof after a build: the FP8 graph is the source graph with Q/DQ pairs where they belong, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build.e4m3 import SUFFIX, Codes, quantized
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.graph.quantizers import dequantizers
from sa3_build.passes.base import run_passes
from sa3_build.passes.store_fp8_weights import StoreWeightsAsFp8
from sa3_build.quantization import reference_recipe, selection as quantization_selection
from sa3_build.quantization.gptq import deviation
from sa3_build.quantization.round_weights import codes_of
from sa3_build.quantization.scales import FP16_SCALE_FLOOR, apply_scales
from sa3_build.quantization.selection import Selection
from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.errors import GateError

QDQ = ("QuantizeLinear", "DequantizeLinear")
MAX_DEVIATION = 0.25  # relative L2 of a channel: rounding takes 0.03 to 0.1, another weight or scale takes more than 1
MAX_FAILURES = 20  # lines a check; a broken graph would otherwise print thousands


@dataclass(frozen=True)
class Check:
    """One claim about the result: how many things were looked at, and what contradicts it."""

    claim: str
    looked_at: int
    failures: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """A claim about nothing does not hold: an empty set would pass every graph."""
        return self.looked_at > 0 and not self.failures


def finish_graph(build: Workspace) -> Mapping[str, Any]:
    """Set the scales, store the weights as E4M3 and prove the result before it is written. Raises GateError."""
    source, result = graph_io.load(build.clean), graph_io.load(build.quantized)
    selection, codes, settings = build.selection, codes_of(build), build.settings
    amax = np.load(build.amax)[:, quantization_selection.columns(build.candidates, selection)]
    if settings.recipe == "reference":
        amax = reference_recipe.bounded(amax)
    counts = apply_scales(result, selection, amax, settings.headroom, settings.ptq == "modelopt")
    if settings.weights == "fp8":
        counts = {**counts, **run_passes(result, [StoreWeightsAsFp8(codes)])[0].counts}
    checks = prove(source, result, selection, codes)
    failures = failures_of(checks)
    if failures:
        raise GateError(
            f"the proof of {build.output.name} failed ({len(failures)} contradictions); nothing was written",
            f"the intermediate graphs lie in {build.folder}; report this with the lines below",
            "\n".join(failures),
        )
    graph_io.save(result, build.result)
    claims = [{"claim": check.claim, "looked at": check.looked_at, "holds": check.holds} for check in checks]
    return {**counts, "proof": claims, "excluded": selection.excluded}


def prove(
    source: ir.Model, result: ir.Model, selection: Selection, codes: Mapping[str, Codes] | None = None
) -> list[Check]:
    """Compare a quantised graph with the clean graph that it was made from; both sorted, nodes named alike.

    `codes` are those that were chosen for some weights, by name; the others' must be the nearest.
    """
    return [
        _placement(result, selection),
        _elsewhere_untouched(source, result),
        _initializers(source, result, selection),
        _stored_weights(source, result, selection, codes or {}),
        _islands(source, result),
        _scales(result),
    ]


def failures_of(checks: list[Check]) -> list[str]:
    """Every contradiction, one a line."""
    lines = []
    for check in checks:
        if check.looked_at == 0:
            lines.append(f"{check.claim}: nothing was found to check")
        lines.extend(f"{check.claim}: {failure}" for failure in check.failures[:MAX_FAILURES])
    return lines


def _placement(result: ir.Model, selection: Selection) -> Check:
    wanted = {product.node: product for product in selection.quantized}
    failures, looked = [], 0
    for node in result.graph:
        if node.op_type not in query.PRODUCTS:
            continue
        looked += 1
        activation, weight = dequantizers(node)
        product = wanted.pop(str(node.name), None)
        if product is None:
            if activation is not None or weight is not None:
                why = selection.excluded.get(str(node.name), "unknown product")
                failures.append(f"{node.name} is quantised but must not be ({why})")
            continue
        if activation is None or weight is None:
            side = "activation" if activation is None else "weight"
            failures.append(f"{node.name} is not quantised on its {side} side")
            continue
        if _scale_size(activation) != 1:
            failures.append(f"{node.name} has {_scale_size(activation)} activation scales, TensorRT takes one a tensor")
        if _scale_size(weight) != (1 if product.channel_axis is None else product.n):
            failures.append(f"{node.name} has {_scale_size(weight)} weight scales for {product.n} output channels")
    failures += [f"{name} is gone" for name in wanted]
    return Check("trunk products are quantised on both sides and no other product is", looked, tuple(failures))


def _elsewhere_untouched(source: ir.Model, result: ir.Model) -> Check:
    """With every Q/DQ pair bypassed, the result is the source: node by node, attribute by attribute, edge by edge."""
    theirs = {str(node.name): node for node in result.graph if node.op_type not in QDQ}
    failures, looked = [], 0
    for node in source.graph:
        looked += 1
        twin = theirs.pop(str(node.name), None)
        if twin is None:
            failures.append(f"{node.name} is gone")
        elif _signature(twin) != _signature(node):
            failures.append(f"{node.name} has changed")
    failures += [f"{name} is new" for name in theirs]
    return Check("everything else is the source graph", looked, tuple(failures))


def _initializers(source: ir.Model, result: ir.Model, selection: Selection) -> Check:
    quantised = {product.weight for product in selection.quantized}
    failures, looked = [], 0
    for name, value in source.graph.initializers.items():
        if name in quantised and f"{name}{SUFFIX}" in result.graph.initializers:
            continue  # stored as E4M3: the next claim
        looked += 1
        twin = result.graph.initializers.get(name)
        if twin is None or twin.const_value is None or value.const_value is None:
            failures.append(f"{name} is gone")
        elif (
            twin.const_value.dtype != value.const_value.dtype
            or twin.const_value.tobytes() != value.const_value.tobytes()
        ):
            failures.append(f"{name} is not bit-identical")
    return Check("initializers are bit-identical to the source", looked, tuple(failures))


def _stored_weights(source: ir.Model, result: ir.Model, selection: Selection, chosen: Mapping[str, Codes]) -> Check:
    """A quantised weight is the source weight behind a quantizer, or E4M3 codes of it for the stored scale.

    Codes are the nearest ones, or those that were chosen; and then no channel may be far from its source.
    """
    by_name = {str(node.name): node for node in result.graph}
    failures, looked = [], 0
    for product in selection.quantized:
        node = by_name.get(product.node)
        dequantize = dequantizers(node)[1] if node is not None else None
        if dequantize is None:
            continue  # the first claim says so
        looked += 1
        stored, scale = dequantize.inputs[0], query.constant_of(dequantize.inputs[1])
        weight = query.constant_of(source.graph.initializers.get(product.weight))
        if stored is None or weight is None or scale is None:
            failures.append(f"{product.weight} of {product.node} is gone")
        elif stored.producer() is None:
            codes = query.constant_of(stored)
            axis = dequantize.attributes.get_int("axis", 1)
            given = chosen.get(product.weight)
            wanted = given.read() if given is not None else quantized(weight, scale, axis)
            what = "the nearest E4M3 of its source" if given is None else "the E4M3 that was chosen for it"
            if codes is None or codes.shape != wanted.shape or codes.tobytes() != wanted.tobytes():
                failures.append(f"{product.weight} of {product.node} is not {what}")
            elif given is not None and not deviation(weight, codes, scale, axis) <= MAX_DEVIATION:
                failures.append(
                    f"{product.weight} of {product.node} is further than {MAX_DEVIATION:.0%} from its source"
                )
    return Check("quantised weights are the source weights", looked, tuple(failures))


def _islands(source: ir.Model, result: ir.Model) -> Check:
    """Island nodes are found in the source; in the result none gives 16 bits or reads a quantised value."""
    typed = {str(v.name): v.dtype for node in source.graph for v in node.outputs}
    names = {str(node.name) for node in find_dit_islands(source).all()}
    failures = []
    for node in result.graph:
        if str(node.name) not in names:
            continue
        for value in node.outputs:
            found = value.dtype or typed.get(str(value.name))
            if found is not None and found in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN):
                failures.append(f"{node.name} gives {found}")
        for operand in node.inputs:
            producer = operand.producer() if operand is not None else None
            if producer is not None and producer.op_type in QDQ:
                failures.append(f"{node.name} reads a quantised value")
    return Check("islands are fp32", len(names), tuple(failures))


def _scales(result: ir.Model) -> Check:
    failures, looked = [], 0
    for node in result.graph:
        if node.op_type not in QDQ:
            continue
        looked += 1
        scale = query.constant_of(node.inputs[1])
        if scale is None:
            failures.append(f"{node.name} has a computed scale")
        elif not np.isfinite(scale.astype(np.float32)).all():
            failures.append(f"{node.name} has a scale that is not finite")
        elif (scale.astype(np.float32) < FP16_SCALE_FLOOR).any():
            failures.append(f"{node.name} has a scale under the floor of {FP16_SCALE_FLOOR:g}")
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None or zero.const_value is None or zero.const_value.dtype != ir.DataType.FLOAT8E4M3FN:
            failures.append(f"{node.name} is not E4M3")
        elif any(zero.const_value.tobytes()):
            failures.append(f"{node.name} has a zero point that is not zero")
    return Check("scales are finite, constant and above the floor", looked, tuple(failures))


def _scale_size(dequantize: ir.Node) -> int:
    scale = query.constant_of(dequantize.inputs[1])
    return 0 if scale is None else int(scale.size)


def _bypass(value: ir.Value | None) -> str:
    while value is not None:
        node = value.producer()
        if node is None:
            return str(value.name).removesuffix(SUFFIX)
        if node.op_type not in QDQ:
            return str(value.name)
        value = node.inputs[0]
    return ""


def _signature(node: ir.Node) -> tuple[object, ...]:
    attributes = tuple(sorted((name, _plain(attribute)) for name, attribute in node.attributes.items()))
    inputs = tuple(_bypass(value) for value in node.inputs)
    while inputs and not inputs[-1]:
        inputs = inputs[:-1]  # a trailing absent input may or may not be written
    return node.domain, node.op_type, attributes, inputs, tuple(str(value.name) for value in node.outputs)


def _plain(attribute: ir.Attr) -> object:
    value = attribute.value
    return (
        value.numpy().tobytes()
        if isinstance(value, ir.TensorProtocol)
        else value
        if not isinstance(value, list)
        else tuple(value)
    )
