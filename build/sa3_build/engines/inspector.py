"""Counts of a compiled engine's layers from TensorRT's engine inspector: FP8 GEMMs, fused attention, fp32 layers.

There are two JSON dialects: TensorRT 10 states a tensor's type in "Format/Datatype", TensorRT 11 in "DataType", and the
latter lists inputs and outputs as "I/O Tensors" instead of "Bindings". Both come from NVIDIA's documentation: no engine
of this project has been inspected on a GPU yet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sa3_trt_core import gpu
from sa3_trt_core.engines.tensorrt_context import deserialize
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import Target

_TYPE_KEYS = ("DataType", "Datatype", "Format/Datatype", "Format")
# The order matters: "bf16" contains "f16", and a long description may name the layout's width before the type.
_TYPES = (
    ("fp8", re.compile(r"fp8|e4m3|e5m2")),
    ("bf16", re.compile(r"bf16|bfloat")),
    ("fp16", re.compile(r"fp16|half|float16")),
    ("int8", re.compile(r"int8")),
    ("int", re.compile(r"int(4|32|64)|bool|uint")),
    ("fp32", re.compile(r"fp32|float")),
)
_GEMM = re.compile(r"gemm|matmul|matrix_?multiply|convolution")
_FUSED = re.compile(r"mha|flash_?att|fused_?attention")
_SOFTMAX = re.compile(r"softmax")
_MOVES = re.compile(r"reformat|shuffle|constant|noop|shape|signal|wait|copy|cast")


@dataclass(frozen=True)
class EngineReport:
    """Counts of an engine's layers; `islands` are fp32 layers other than GEMMs and attention."""

    layers: int
    fp8_gemms: int
    fp16_gemms: int
    fp32_gemms: int
    fused_attention: int
    unfused_softmax: int
    islands: int

    @property
    def as_dict(self) -> dict[str, int]:
        """Counts by name, for tables and JSON."""
        return asdict(self)


def inspect(path: Path, backend: str) -> EngineReport:
    """Return the report of an engine file. Raises ToolError on a machine without its GPU."""
    module = gpu.tensorrt_module(backend)
    if module is None or gpu.current_arch() is None:
        raise ToolError("--engine-report requires the engine's GPU", "run it on a machine with that GPU")
    message, hint = f"{backend} cannot load {path} on this GPU", "rebuild it on this machine with --force"
    loaded = deserialize(module, path.read_bytes(), message, hint)
    return read_report(
        loaded.engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    )


def read_report(text: str) -> EngineReport:
    """Return the counts from the inspector's JSON. Raises ToolError for an unknown format or one without details."""
    try:
        document = json.loads(text)
        layers = document["Layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _unknown("not the JSON of TensorRT's inspector") from None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, Mapping) for layer in layers):
        raise _unknown("its layers have names but no details")
    kinds = [_kind(layer) for layer in layers]
    return EngineReport(
        layers=len(layers),
        fp8_gemms=kinds.count("fp8 gemm"),
        fp16_gemms=kinds.count("fp16 gemm") + kinds.count("bf16 gemm"),
        fp32_gemms=kinds.count("fp32 gemm"),
        fused_attention=kinds.count("attention"),
        unfused_softmax=kinds.count("softmax"),
        islands=kinds.count("fp32"),
    )


def broken_gates(report: EngineReport, target: Target) -> list[str]:
    """Return one message per failed check of the engine's layers."""
    failures: list[str] = []
    if target.kind != "dit":
        return failures
    gemms = report.fp8_gemms + report.fp16_gemms + report.fp32_gemms
    if target.precision == "fp8" and report.fp8_gemms * 2 <= gemms:
        failures.append(f"{report.fp8_gemms} of {gemms} GEMMs are in FP8 (required: more than half)")
    if target.precision != "fp32" and report.unfused_softmax:
        failures.append(f"{report.unfused_softmax} unfused softmax layers: attention was not fused")
    if target.precision != "fp32" and report.fp32_gemms > report.fp16_gemms + report.fp8_gemms:
        failures.append(f"{report.fp32_gemms} of {gemms} GEMMs are in fp32")
    return failures


def _kind(layer: Mapping[str, Any]) -> str:
    words = " ".join(str(layer.get(key, "")) for key in ("LayerType", "TacticName", "Name")).lower()
    layer_type = str(layer.get("LayerType", "")).lower()
    types = [_type(tensor) for tensor in _tensors(layer.get("Inputs"))]
    if _FUSED.search(words):
        return "attention"
    if _SOFTMAX.search(words):
        return "softmax"
    if _GEMM.search(layer_type) or _GEMM.search(str(layer.get("TacticName", "")).lower()):
        # A GEMM has the type of its narrowest operand: biases and scales have wider types.
        return next((f"{name} gemm" for name, _ in _TYPES if name in types), "gemm")
    if _MOVES.search(layer_type):
        return "move"
    return (
        "fp32"
        if "fp32" in types and "fp32" in [_type(tensor) for tensor in _tensors(layer.get("Outputs"))]
        else "other"
    )


def _tensors(value: Any) -> Sequence[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []


def _type(tensor: Mapping[str, Any]) -> str:
    for key in _TYPE_KEYS:
        text = str(tensor.get(key, "")).lower()
        for name, pattern in _TYPES:
            if pattern.search(text):
                return name
    return ""


def _unknown(problem: str) -> ToolError:
    return ToolError(f"cannot read the engine's layers: {problem}", "rebuild the engine with --force")
