"""Time a DiT step with and without adapters, and a change of adapters, on random weights (PyTorch engine)."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.cli.arguments import Parser, integer_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import torch

    from sa3_trt_core.engines.torch import TorchEngine
    from sa3_trt_core.lora.lora_set import LoraSet

HEADER = ("precision", "step, ms", "with adapter", "ratio", "first set, s", "other strength", "again", "without")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="bench_lora.py", description=__doc__)
    parser.add_argument(
        "--rank", type=integer_type(1, 512), default=16, help="rank of the random adapter (default: 16)"
    )
    parser.add_argument("--frames", type=integer_type(1, 4096), default=646, help="latent frames (default: 646)")
    parser.add_argument(
        "--repeats", type=integer_type(1, 10_000), default=100, help="number of timed steps of each (default: 100)"
    )
    parser.add_argument("--precisions", nargs="+", choices=("fp8", "fp16mixed"), default=["fp8", "fp16mixed"])
    parser.add_argument("--work", type=Path, help="folder for 5 GB of random engines (default: a temporary folder)")
    parser.add_argument("--out", type=Path, metavar="F.json", help="also write the figures to this file")
    parser.add_argument("--tiny", action="store_true", help="use a tiny DiT, also on a CPU: a functional check only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Make random engines and an adapter, time, print."""
    args = make_parser().parse_args(argv)

    import torch

    from sa3_trt_core import console
    from sa3_trt_core.artifacts import files

    if not torch.cuda.is_available() and not args.tiny:
        raise ToolError("the benchmark needs an NVIDIA GPU", "--tiny runs a tiny DiT on this machine")
    if args.out is not None:
        files.require_writable(args.out, "--out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        engines, adapter = _made(Path(folder), args, device)
        rows = [_timed(precision, engines, adapter, args, device) for precision in args.precisions]
    cells = [[row["precision"], *(f"{row[name]:.3f}" for name in list(row)[1:])] for row in rows]
    print(console.table(HEADER, cells))
    if args.out is not None:
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        files.write_atomic_text(
            args.out, json.dumps({"device": card, "rank": args.rank, "rows": rows}, indent=1) + "\n"
        )
    return 0


def _made(folder: Path, args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Path], Path]:
    """Write packed engines of one random DiT by precision, and an adapter of every layer of it."""
    import torch
    from safetensors.torch import save_file

    from sa3_bench import random_dit
    from sa3_trt_core.artifacts import manifest
    from sa3_trt_core.lora.layers import layer_of_role, roles
    from sa3_trt_core.torch_models.dit import weights

    module = random_dit.random_module(random_dit.SMALL if args.tiny else random_dit.MEDIUM, device)
    engines: dict[str, Path] = {}
    tensors: dict[str, torch.Tensor] = {}
    for precision in ("fp16mixed", "fp8"):
        packed = random_dit.packed_of(module, precision)
        path = engines[precision] = folder / f"dit_{precision}.safetensors"
        tensors_by_name = {name: packed.tensor(name).cpu().clone() for name in packed.names}
        save_file(tensors_by_name, str(path), metadata=weights.header(packed.sizes))
        manifest.write_manifest(path, "engine", [path], {}, {})
        for role in roles(packed.sizes.depth):
            weight = tensors_by_name[role if role in tensors_by_name else f"{role}.weight"]
            at, into = (
                f"{layer_of_role(role)}.parametrizations.weight.0.",
                257 if "local_in" in role else weight.shape[1],
            )
            tensors[f"{at}lora_A"] = (torch.randn(args.rank, into) / into**0.5).half()
            tensors[f"{at}lora_B"] = (0.02 * torch.randn(weight.shape[0], args.rank)).half()
    config = {"rank": args.rank, "alpha": args.rank, "adapter_type": "lora"}
    save_file(tensors, str(folder / "random.safetensors"), metadata={"lora_config": json.dumps(config)})
    return engines, folder / "random.safetensors"


def _timed(
    precision: str, engines: dict[str, Path], adapter: Path, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Return step times (ms) and times of a change of adapters (s) of one engine, weights in the page cache."""
    from sa3_bench.random_dit import random_inputs
    from sa3_trt_core.engines.torch import TorchEngine
    from sa3_trt_core.lora.lora_set import LoraSet, LoraSpec

    inputs = random_inputs(1, args.frames, device, seed=0)
    full, half = (LoraSet.read([LoraSpec(adapter, strength)]) for strength in (1.0, 0.5))
    with TorchEngine(engines[precision], "") as engine:
        plain = _step_ms(engine, inputs, args.repeats)
        first = _change_s(engine, full, engines)
        adapted = _step_ms(engine, inputs, args.repeats)
        changes = [_change_s(engine, loras, engines) for loras in (half, full, LoraSet())]
        plain = min(plain, _step_ms(engine, inputs, args.repeats))
    names = ("other strength", "again", "without")
    return {
        "precision": precision, "step": plain, "adapted": adapted, "ratio": adapted / plain, "first set": first,
        **dict(zip(names, changes, strict=True)),
    }  # fmt: skip


def _step_ms(engine: TorchEngine, inputs: dict[str, torch.Tensor], repeats: int) -> float:
    """Return the median time of a step in ms, after the first eager run of a new adapter."""
    from sa3_bench.timing import median_ms

    engine.run(inputs)
    engine.saturated()
    return median_ms(lambda: engine.run(inputs), repeats)


def _change_s(engine: TorchEngine, loras: LoraSet, engines: dict[str, Path]) -> float:
    import torch

    started = time.perf_counter()
    engine.set_loras(loras, engines["fp16mixed"], "")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(run_command(main))
