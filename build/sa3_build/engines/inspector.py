"""What a compiled engine consists of, from TensorRT's engine inspector: FP8 products, fused attention, fp32 islands.

Two dialects: TensorRT 10 writes a tensor's type into "Format/Datatype", TensorRT 11 into "DataType", and lists inputs
and outputs as "I/O Tensors" instead of "Bindings". The source of both is NVIDIA's documentation: no engine of this
project has been inspected on a GPU yet.
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
# In this order: "bf16" holds "f16", and a long description may name the layout's width before the type.
_TYPES = (
    ("fp8", re.compile(r"fp8|e4m3|e5m2")),
    ("bf16", re.compile(r"bf16|bfloat")),
    ("fp16", re.compile(r"fp16|half|float16")),
    ("int8", re.compile(r"int8")),
    ("int", re.compile(r"int(4|32|64)|bool|uint")),
    ("fp32", re.compile(r"fp32|float")),
)
_PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|convolution")
_FUSED = re.compile(r"mha|flash_?att|fused_?attention")
_SOFTMAX = re.compile(r"softmax")
_MOVES = re.compile(r"reformat|shuffle|constant|noop|shape|signal|wait|copy|cast")


@dataclass(frozen=True)
class EngineReport:
    """Counts of an engine's layers. `islands` are layers that calculate in fp32 and are no product and no attention."""

    layers: int
    fp8_products: int
    half_products: int
    single_products: int
    fused_attention: int
    loose_softmax: int
    islands: int

    @property
    def by_name(self) -> dict[str, int]:
        """For people and for JSON."""
        return asdict(self)


def inspect(path: Path, backend: str) -> EngineReport:
    """Return the report of an engine file on this machine's GPU. Raises ToolError without one."""
    module = gpu.tensorrt_module(backend)
    if module is None or gpu.current_arch() is None:
        raise ToolError("--engine-report loads the engine, and that needs its GPU", "run it on the machine of the GPU")
    refused, again = f"{backend} refuses {path} on this GPU", "build it on this machine with --force"
    loaded = deserialize(module, path.read_bytes(), refused, again)
    return read_report(
        loaded.engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    )


def read_report(text: str) -> EngineReport:
    """Return the counts of what the inspector wrote. Raises ToolError if it is in neither dialect or has no details."""
    try:
        document = json.loads(text)
        layers = document["Layers"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _unknown("it is not the inspector's JSON") from None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, Mapping) for layer in layers):
        raise _unknown("its layers have names only")
    kinds = [_kind(layer) for layer in layers]
    return EngineReport(
        layers=len(layers),
        fp8_products=kinds.count("fp8 product"),
        half_products=kinds.count("fp16 product") + kinds.count("bf16 product"),
        single_products=kinds.count("fp32 product"),
        fused_attention=kinds.count("attention"),
        loose_softmax=kinds.count("softmax"),
        islands=kinds.count("fp32"),
    )


def broken_gates(report: EngineReport, target: Target) -> list[str]:
    """What an engine of this target must not be: a sentence for each gate that says no."""
    found: list[str] = []
    if target.kind != "dit":
        return found
    products = report.fp8_products + report.half_products + report.single_products
    if target.precision == "fp8" and report.fp8_products * 2 <= products:
        found.append(f"{report.fp8_products} of {products} products are in FP8, and it is to be more than half")
    if target.precision != "fp32" and report.loose_softmax:
        found.append(f"{report.loose_softmax} softmaxes stand alone: attention is not fused there")
    if target.precision != "fp32" and report.single_products > report.half_products + report.fp8_products:
        found.append(f"{report.single_products} of {products} products are in fp32")
    return found


def _kind(layer: Mapping[str, Any]) -> str:
    words = " ".join(str(layer.get(key, "")) for key in ("LayerType", "TacticName", "Name")).lower()
    layer_type = str(layer.get("LayerType", "")).lower()
    types = [_type(tensor) for tensor in _tensors(layer.get("Inputs"))]
    if _FUSED.search(words):
        return "attention"
    if _SOFTMAX.search(words):
        return "softmax"
    if _PRODUCT.search(layer_type) or _PRODUCT.search(str(layer.get("TacticName", "")).lower()):
        # A product is of its narrowest operand: biases and scales ride along in wider types.
        return next((f"{name} product" for name, _ in _TYPES if name in types), "product")
    if _MOVES.search(layer_type):
        return "move"
    return "fp32" if "fp32" in types and "fp32" in [_type(one) for one in _tensors(layer.get("Outputs"))] else "other"


def _tensors(value: Any) -> Sequence[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _type(tensor: Mapping[str, Any]) -> str:
    for key in _TYPE_KEYS:
        text = str(tensor.get(key, "")).lower()
        for name, pattern in _TYPES:
            if pattern.search(text):
                return name
    return ""


def _unknown(why: str) -> ToolError:
    return ToolError(f"cannot read the engine's layers: {why}", "build the engine again with --force")
