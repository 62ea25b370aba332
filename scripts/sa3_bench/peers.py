"""Contestants of the benchmark: our engine in two precisions, diffusers eager, compiled, and with torchao's float8."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sa3_bench.comparison import MIN_COSINE, Contest, Step
from sa3_bench.random_dit import MEDIUM, SMALL, duration_token, packed_of, random_module
from sa3_trt_core.cuda_graph import capture
from sa3_trt_core.torch_models.dit.model import Dit
from sa3_trt_core.torch_models.dit.reference_ops import PlainOps
from sa3_trt_core.torch_models.dit.runner import CONDITIONING, Runner
from sa3_trt_core.torch_models.dit.weights import Packed

OURS = ("fp8", "fp16mixed")
EAGER, COMPILED, TORCHAO = "diffusers fp16", "diffusers fp16 compiled", "diffusers torchao float8 compiled"
PEERS = (EAGER, COMPILED, TORCHAO)
WARM_RUNS = 3
MAX_SHAPES = 64  # each shape is compiled; beyond its limit Dynamo runs eagerly without a message


class Ours:
    """Our engine on packed weights; `prepare` returns a step that replays its graph."""

    def __init__(self, packed: Packed, device: torch.device) -> None:
        tables = packed.tensor("cosine"), packed.tensor("sine")
        if device.type == "cuda":
            from sa3_trt_core.torch_models.dit.autotune import tuned
            from sa3_trt_core.torch_models.dit.triton_ops import FusedOps

            self.tiles = tuned(packed.sizes, device)
            self._runner = Runner(Dit(packed, FusedOps(*tables, self.tiles)), device)
        else:
            self._runner = Runner(Dit(packed, PlainOps(*tables)), device)

    def prepare(self, inputs: dict[str, Tensor]) -> Step:
        conditioning = {name: inputs[name].cpu() for name in CONDITIONING}
        return self._runner.prepared(inputs["x"], inputs["t"].cpu(), conditioning)

    def call(self, inputs: dict[str, Tensor]) -> Step:
        """Return a complete call as the sampler makes it: inputs and velocity on the CPU, including host work."""
        on_cpu = {name: value.cpu() for name, value in inputs.items()}
        conditioning = {name: on_cpu[name] for name in CONDITIONING}
        return lambda: self._runner.velocity(on_cpu["x"], on_cpu["t"], conditioning).cpu()

    def close(self) -> None:
        self._runner.close()


class Diffusers:
    """diffusers' module in fp16: eager, or its blocks compiled and the forward replayed as a CUDA graph."""

    def __init__(self, module: Any, packed: Packed, kind: str) -> None:
        self._packed, self._kind = packed, kind
        self._module = copy.deepcopy(module).half()
        if kind == TORCHAO:
            from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

            quantize_(self._module, Float8DynamicActivationFloat8WeightConfig(), _is_trunk)
        if kind != EAGER:
            torch._dynamo.config.recompile_limit = MAX_SHAPES
            for block in self._module.transformer_blocks:
                block.compile(dynamic=False)

    def prepare(self, inputs: dict[str, Tensor]) -> Step:
        half = {name: value.half() for name, value in inputs.items()}
        token = duration_token(self._packed, inputs["seconds_total"]).half()
        keep = half["t5_mask"].unsqueeze(-1) > 0.5
        text = torch.where(keep, half["t5_hidden"], self._module.prompt_padding_embedding)
        context = torch.cat([text, token.unsqueeze(1)], dim=1)

        def forward() -> Tensor:
            velocity: Tensor = self._module(
                half["x"], inputs["t"], encoder_hidden_states=context, global_hidden_states=token,
                local_add_cond=half["local_add_cond"], return_dict=False,
            )[0]  # fmt: skip
            return velocity

        return forward if self._kind == EAGER else _graphed(forward)

    def close(self) -> None:
        torch.compiler.reset()


def _graphed(forward: Step) -> Step:
    graph, output = capture(forward, warm_runs=WARM_RUNS)

    def step() -> Tensor:
        graph.replay()
        return output

    return step


def _is_trunk(part: nn.Module, name: str) -> bool:
    """Return True for the linears that our recipe quantises."""
    return isinstance(part, nn.Linear) and "transformer_blocks" in name and "local" not in name


def contest_of(names: Sequence[str], tiny: bool, device: torch.device) -> Contest:
    """Return our engine and its peers by name, on the same random weights of full size (or tiny)."""
    module = random_module(SMALL if tiny else MEDIUM, device)
    packed = packed_of(module, "fp8")
    judged = {name: MIN_COSINE[name] for name in names if name in OURS}
    return Contest(
        {name: make(name, module, packed, device) for name in names}, judged,
        lambda inputs: _reference(module, packed, inputs), "the fp32 module", "the best peer", packed.sizes,
    )  # fmt: skip


def _reference(module: Any, packed: Packed, inputs: dict[str, Tensor]) -> Tensor:
    """Return the module's velocity in fp32, row by row, because fp32 attention of a batch needs too much memory."""
    token = duration_token(packed, inputs["seconds_total"])
    keep = inputs["t5_mask"].unsqueeze(-1) > 0.5
    text = torch.where(keep, inputs["t5_hidden"], module.prompt_padding_embedding)
    context = torch.cat([text, token.unsqueeze(1)], dim=1)
    rows = [
        module(inputs["x"][row], inputs["t"][row], encoder_hidden_states=context[row],
               global_hidden_states=token[row], local_add_cond=inputs["local_add_cond"][row], return_dict=False)[0]
        for row in (slice(index, index + 1) for index in range(len(token)))
    ]  # fmt: skip
    return torch.cat(rows)


def make(name: str, module: Any, packed: Packed, device: torch.device) -> Ours | Diffusers:
    """Return a contestant by name, on the weights of `module`."""
    if name in OURS:
        return Ours(packed if packed.sizes.precision == name else packed_of(module, name), device)
    return Diffusers(module, packed, name)
