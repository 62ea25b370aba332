"""Proof after a build: the FP8 graph equals the source graph except for Q/DQ pairs where they belong."""

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
MAX_DEVIATION = 0.25  # relative L2 of a channel: rounding causes 0.03 to 0.1, a wrong weight or scale more than 1
MAX_FAILURES = 20  # printed per check; a broken graph would otherwise print thousands


@dataclass(frozen=True)
class Check:
    """One claim about the result: the number of items checked, and the contradictions."""

    claim: str
    checked: int
    failures: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True without failures and with at least one checked item: an empty claim would pass every graph."""
        return self.checked > 0 and not self.failures


def finish_graph(build: Workspace) -> Mapping[str, Any]:
    """Set the scales, store the weights as E4M3 and prove the result, then write it. Raises GateError."""
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
            f"intermediate graphs: {build.folder}; report this with the lines below",
            "\n".join(failures),
        )
    graph_io.save(result, build.result)
    claims = [{"claim": check.claim, "checked": check.checked, "holds": check.holds} for check in checks]
    return {**counts, "proof": claims, "excluded": selection.excluded}


def prove(
    source: ir.Model, result: ir.Model, selection: Selection, codes: Mapping[str, Codes] | None = None
) -> list[Check]:
    """Compare a quantised graph with the clean graph that it was made from; both sorted, with equal node names.

    `codes` are the codes chosen for some weights, by name; other weights must have the nearest codes.
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
    """Return every contradiction, one line each."""
    lines = []
    for check in checks:
        if check.checked == 0:
            lines.append(f"{check.claim}: nothing to check")
        lines.extend(f"{check.claim}: {failure}" for failure in check.failures[:MAX_FAILURES])
    return lines


def _placement(result: ir.Model, selection: Selection) -> Check:
    expected = {linear.node: linear for linear in selection.quantized}
    failures, checked = [], 0
    for node in result.graph:
        if node.op_type not in query.GEMM_OPS:
            continue
        checked += 1
        activation, weight = dequantizers(node)
        linear = expected.pop(str(node.name), None)
        if linear is None:
            if activation is not None or weight is not None:
                reason = selection.excluded.get(str(node.name), "unknown node")
                failures.append(f"{node.name} is quantised but must not be ({reason})")
            continue
        if activation is None or weight is None:
            side = "activation" if activation is None else "weight"
            failures.append(f"{node.name} is not quantised on its {side} side")
            continue
        if _scale_size(activation) != 1:
            failures.append(f"{node.name} has {_scale_size(activation)} activation scales (TensorRT: one per tensor)")
        if _scale_size(weight) != (1 if linear.channel_axis is None else linear.n):
            failures.append(f"{node.name} has {_scale_size(weight)} weight scales for {linear.n} output channels")
    failures += [f"{name} is missing" for name in expected]
    return Check("trunk linears are quantised on both sides and no other GEMM is", checked, tuple(failures))


def _elsewhere_untouched(source: ir.Model, result: ir.Model) -> Check:
    """Check that the result without Q/DQ pairs equals the source: nodes, attributes and edges."""
    result_nodes = {str(node.name): node for node in result.graph if node.op_type not in QDQ}
    failures, checked = [], 0
    for node in source.graph:
        checked += 1
        result_node = result_nodes.pop(str(node.name), None)
        if result_node is None:
            failures.append(f"{node.name} is missing")
        elif _signature(result_node) != _signature(node):
            failures.append(f"{node.name} has changed")
    failures += [f"{name} is new" for name in result_nodes]
    return Check("everything else is the source graph", checked, tuple(failures))


def _initializers(source: ir.Model, result: ir.Model, selection: Selection) -> Check:
    quantised = {linear.weight for linear in selection.quantized}
    failures, checked = [], 0
    for name, value in source.graph.initializers.items():
        if name in quantised and f"{name}{SUFFIX}" in result.graph.initializers:
            continue  # stored as E4M3: checked by _stored_weights
        checked += 1
        result_value = result.graph.initializers.get(name)
        if result_value is None or result_value.const_value is None or value.const_value is None:
            failures.append(f"{name} is missing")
        elif (
            result_value.const_value.dtype != value.const_value.dtype
            or result_value.const_value.tobytes() != value.const_value.tobytes()
        ):
            failures.append(f"{name} is not bit-identical")
    return Check("initializers are bit-identical to the source", checked, tuple(failures))


def _stored_weights(source: ir.Model, result: ir.Model, selection: Selection, chosen: Mapping[str, Codes]) -> Check:
    """Check that a quantised weight is the source weight with a quantizer, or its E4M3 codes for the stored scale.

    Codes must be the nearest or the chosen ones; a channel of the latter may not be far from its source.
    """
    nodes = {str(node.name): node for node in result.graph}
    failures, checked = [], 0
    for linear in selection.quantized:
        node = nodes.get(linear.node)
        dequantize = dequantizers(node)[1] if node is not None else None
        if dequantize is None:
            continue  # _placement reports it
        checked += 1
        stored, scale = dequantize.inputs[0], query.constant_of(dequantize.inputs[1])
        weight = query.constant_of(source.graph.initializers.get(linear.weight))
        if stored is None or weight is None or scale is None:
            failures.append(f"{linear.weight} of {linear.node} is missing")
        elif stored.producer() is None:
            codes = query.constant_of(stored)
            axis = dequantize.attributes.get_int("axis", 1)
            chosen_codes = chosen.get(linear.weight)
            expected = chosen_codes.read() if chosen_codes is not None else quantized(weight, scale, axis)
            what = "the nearest E4M3 codes" if chosen_codes is None else "the E4M3 codes chosen for it"
            if codes is None or codes.shape != expected.shape or codes.tobytes() != expected.tobytes():
                failures.append(f"{linear.weight} of {linear.node} does not have {what}")
            elif chosen_codes is not None and not deviation(weight, codes, scale, axis) <= MAX_DEVIATION:
                failures.append(
                    f"{linear.weight} of {linear.node} differs by more than {MAX_DEVIATION:.0%} from its source"
                )
    return Check("quantised weights are the source weights", checked, tuple(failures))


def _islands(source: ir.Model, result: ir.Model) -> Check:
    """Check that the source's island nodes return no 16-bit values and read no quantised values in the result."""
    typed = {str(v.name): v.dtype for node in source.graph for v in node.outputs}
    names = {str(node.name) for node in find_dit_islands(source).all()}
    failures = []
    for node in result.graph:
        if str(node.name) not in names:
            continue
        for value in node.outputs:
            value_dtype = value.dtype or typed.get(str(value.name))
            if value_dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN):
                failures.append(f"{node.name} returns {value_dtype}")
        for operand in node.inputs:
            producer = operand.producer() if operand is not None else None
            if producer is not None and producer.op_type in QDQ:
                failures.append(f"{node.name} reads a quantised value")
    return Check("islands are fp32", len(names), tuple(failures))


def _scales(result: ir.Model) -> Check:
    failures, checked = [], 0
    for node in result.graph:
        if node.op_type not in QDQ:
            continue
        checked += 1
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
    return Check("scales are finite, constant and above the floor", checked, tuple(failures))


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
        inputs = inputs[:-1]  # trailing absent inputs are optional in the file
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
