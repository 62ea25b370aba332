"""Training state on disk: 16-bit weights in files of less than 16 MiB, and the progress of the run.

The weights are the running means; after an interruption the optimiser restarts with a short warm-up. The index is
written last, so that a killed run leaves the previous state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sa3_trt_core.artifacts import files

INDEX = "state.json"
MAX_FILE_BYTES = 15 << 20  # bytes


@dataclass
class TrainingState:
    """Tensors by name, the current stage, its finished steps, and the losses recorded so far.

    `kept` contains, by part, how weights were made that this run reuses and does not train.
    """

    stage: str = "autoencoder"
    step: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors under a prefix, without it, in fp32."""
        start = f"{prefix}/"
        return {key[len(start) :]: value.float() for key, value in self.tensors.items() if key.startswith(start)}

    def replace(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the tensors under a prefix."""
        self.drop(prefix)
        self.tensors |= {f"{prefix}/{key}": value.detach().to("cpu", torch.float16) for key, value in tensors.items()}

    def drop(self, prefix: str) -> None:
        """Remove the tensors under a prefix."""
        self.tensors = {key: value for key, value in self.tensors.items() if not key.startswith(f"{prefix}/")}


def save(folder: Path, state: TrainingState) -> None:
    """Write a state into `folder`: new shards, then the index; then old shards are deleted."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    mark = f"{state.stage}-{state.step:06d}"
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for key in sorted(state.tensors):
        size = state.tensors[key].numel() * 2
        if filled and filled + size > MAX_FILE_BYTES:
            shards.append({})
            filled = 0
        shards[-1][key] = state.tensors[key].contiguous()
        filled += size
    names = [f"{mark}-{number}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        with files.atomic_path(folder / name) as temporary:
            save_file(shard, str(temporary))
    index = {"stage": state.stage, "step": state.step, "shards": names, "notes": state.notes, "kept": state.kept}
    files.write_atomic_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    for old in folder.glob("*.safetensors"):
        if old.name not in names:
            old.unlink()


def load(folder: Path) -> TrainingState:
    """Return the state in `folder`, or a new one for an empty folder."""
    from safetensors.torch import load_file

    if not (folder / INDEX).is_file():
        return TrainingState()
    index = json.loads((folder / INDEX).read_text())
    state = TrainingState(stage=index["stage"], step=index["step"], notes=index["notes"], kept=index.get("kept", {}))
    for name in index["shards"]:
        state.tensors |= load_file(str(folder / name))
    return state


def start(folder: Path, state: TrainingState, tokenizer: Path) -> None:
    """Create a work folder with an existing state and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    save(folder, state)


def copy(folder: Path, target: Path) -> None:
    """Copy a finished state to another folder."""
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, target / file.name)
