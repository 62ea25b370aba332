"""Export torch modules as ONNX graphs with the contract of the published ones.

Uses PyTorch's exporter (`dynamo=True`) at opset 19: the first with FP8 types, and the last that does not fuse attention
into an op that TensorRT rejects in fp32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import nn

from sa3_build.graph import io as graph_io
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_trt_core.shapes import CONTRACTS, SAMPLES_PER_FRAME, GraphContract, TensorSpec

OPSET = 19


def export_module(module: nn.Module, kind: str, inputs: Sequence[torch.Tensor]) -> ir.Model:
    """Return one module as an ONNX graph of the contract `kind`, with dynamic symbolic axes.

    `inputs` are example tensors in the contract's order; symbolic axes must have at least 2 entries, because the
    exporter treats an axis of 1 as constant.
    """
    contract = CONTRACTS[kind]
    dynamic = _dynamic_shapes(contract)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=[spec.name for spec in contract.inputs],
            output_names=[spec.name for spec in contract.outputs],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    model = program.model
    del program
    optimize_ir(model, should_fold=_small)
    run_passes(model, [FoldWeights()])
    name_interface(model, contract)
    graph_io.drop_exporter_notes(model)
    return model


def example_inputs(kind: str, batch: int = 2, frames: int = 34, seed: int = 0) -> list[torch.Tensor]:
    """Return random tensors with the contract's shapes, for tracing and for checks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": batch, "L": frames, "N": frames * SAMPLES_PER_FRAME}
    tensors = []
    for spec in CONTRACTS[kind].inputs:
        shape = [_extent(dim, sizes) for dim in spec.dims]
        if spec.dtype == "int64":
            tensors.append(torch.ones(shape, dtype=torch.int64))
        elif spec.name == "t5_mask":
            tensors.append((torch.arange(shape[-1]) < shape[-1] // 3).float().expand(shape).clone())
        elif spec.name == "t":
            tensors.append(torch.rand(shape, generator=generator))
        elif spec.name == "seconds_total":
            tensors.append(torch.rand(shape, generator=generator) * 100 + 1)
        else:
            tensors.append(torch.randn(shape, generator=generator))
    return tensors


def name_interface(model: ir.Model, contract: GraphContract) -> None:
    """Set the contract's symbolic shapes on inputs and outputs."""
    for values, specs in ((model.graph.inputs, contract.inputs), (model.graph.outputs, contract.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.shape = ir.Shape([dim if isinstance(dim, int) else str(dim) for dim in spec.dims])


def _small(node: ir.Node) -> bool | None:
    """Return False for the Transpose of a weight, which FoldWeights folds: the optimiser would keep every folded
    weight.

    All of them together take 6 GB.
    """
    stored = node.inputs[0].const_value if node.op_type == "Transpose" and node.inputs[0] is not None else None
    return False if stored is not None and stored.nbytes > graph_io.SIDECAR_THRESHOLD else None


def _dynamic_shapes(contract: GraphContract) -> tuple[Mapping[int, Any], ...]:
    dims: dict[str, Any] = {"B": torch.export.Dim("B", min=1, max=64), "L": torch.export.Dim("L", min=1, max=8192)}
    dims["N"] = SAMPLES_PER_FRAME * dims["L"]  # whole frames only; the exporter derives this constraint
    return tuple(_dynamic_axes(spec, dims) for spec in contract.inputs)


def _dynamic_axes(spec: TensorSpec, dims: Mapping[str, Any]) -> Mapping[int, Any]:
    return {axis: dims[dim] for axis, dim in enumerate(spec.dims) if isinstance(dim, str) and dim in dims}


def _extent(dim: int | str, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the exporter prints on stdout and its deprecation warnings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
