"""Shipped weights: 16-bit safetensors in the repository, and the native fp32 checkpoint made from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sa3_build.export import load_modules as native, native_weights
from sa3_demo import text_encoder
from sa3_demo.checkpoint import TEXT_FOLDER, native_tensors
from sa3_demo.model import DemoModel, geometry_of
from sa3_demo.plan import TrainingPlan
from sa3_demo.state import TrainingState
from sa3_demo.text_encoder import DemoSize
from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError

PARTS = ("autoencoder", "dit", "text")  # one file each
TRAINING_FILE = "training.json"
TOKENIZER_FILE = "tokenizer.json"


def write_shipped(
    state: TrainingState, plan: TrainingPlan, tokenizer: Path, folder: Path, made_with: Mapping[str, str]
) -> None:
    """Write the weights of a run, its tokenizer, settings and losses into `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in PARTS}
    parts["autoencoder"] = state.part("autoencoder")
    for key, tensor in state.part("model").items():
        parts["text" if key.startswith("text.") else "dit"][key] = tensor
    for name, tensors in parts.items():
        kind = torch.bfloat16 if name == "text" else torch.float16
        stored = {key: tensor.to(kind).contiguous() for key, tensor in sorted(tensors.items())}
        with files.atomic_path(folder / f"{name}.safetensors") as temporary:
            save_file(stored, str(temporary))
    files.write_atomic_bytes(folder / TOKENIZER_FILE, tokenizer.read_bytes())
    record = {
        "stage": state.stage, "step": state.step, "plan": asdict(plan), "losses": state.notes,
        "made_with": dict(made_with), "kept": state.kept,
    }  # fmt: skip
    files.write_atomic_text(folder / TRAINING_FILE, json.dumps(record, indent=1) + "\n")


def read_state(shipped: Path, size: DemoSize, anew_from: str | None = None) -> TrainingState:
    """Return the state to continue training from: the shipped weights, also as teacher before distillation.

    With `anew_from` only the autoencoder is used, and that stage starts at its first step; the record of how the
    autoencoder was made goes into `kept`. Raises ToolError when training is complete, the size differs, or weights are
    missing.
    """
    require_shipped(shipped)
    record = json.loads((shipped / TRAINING_FILE).read_text())
    if record["plan"]["size"] != asdict(size):
        raise ToolError(f"{shipped} contains a model of another size", "omit --start-from to train a new model")
    if anew_from:
        notes = [note for note in record["losses"] if note["stage"] == "autoencoder"]
        state = TrainingState(stage=anew_from, notes=notes, kept={"autoencoder": record["made_with"]})
        state.replace("autoencoder", _read(shipped, "autoencoder"))
        return state
    if record["stage"] == "done":
        raise ToolError(
            f"training of {shipped} is complete",
            "omit --start-from to train a new model, or add --from-stage flow to keep its autoencoder",
        )
    state = TrainingState(
        stage=record["stage"], step=record["step"], notes=record["losses"], kept=record.get("kept", {})
    )
    model = {**_read(shipped, "dit"), **_read(shipped, "text")}
    for name, tensors in (("autoencoder", _read(shipped, "autoencoder")), ("model", model), ("teacher", model)):
        state.replace(name, tensors)
    return state


def write_checkpoint(shipped: Path, folder: Path, seed: int) -> DemoSize:
    """Write the native fp32 checkpoint of the shipped weights into the existing, empty `folder`; return its size.

    The decoder of the text model is never run and is not shipped: it gets random weights from `seed`. Raises ToolError
    when a shipped file is missing or does not fit.
    """
    from safetensors.torch import save_file
    from tokenizers import Tokenizer

    require_shipped(shipped)
    size = DemoSize(**json.loads((shipped / TRAINING_FILE).read_text())["plan"]["size"])
    geometry = geometry_of(size, folder)
    tokenizer = Tokenizer.from_file(str(shipped / TOKENIZER_FILE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DemoModel(geometry, size, tokenizer.get_vocab_size())
        text = text_encoder.random_text_model(size, tokenizer.get_vocab_size())
        autoencoder = native.build_autoencoder(geometry.autoencoder)
    _fill(model, {**_read(shipped, "dit"), **_read(shipped, "text")}, shipped)
    _fill(autoencoder, _read(shipped, "autoencoder"), shipped)
    text.model.encoder.load_state_dict(model.text.encoder.state_dict())
    state = dict(native_tensors(model.dit, model.duration, autoencoder, geometry))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(folder / native_weights.WEIGHTS_FILE))
    text_encoder.save_tokenizer(folder / TEXT_FOLDER, tokenizer)
    text_encoder.write_text_model(folder / TEXT_FOLDER, text)
    return size


def require_shipped(shipped: Path) -> None:
    """Raise ToolError when a shipped file is missing."""
    for file in shipped_files(shipped):
        if not file.is_file():
            raise ToolError(
                f"no demonstration weights: {file} is missing", "check out the complete repository, or use --random"
            )


def shipped_files(shipped: Path) -> list[Path]:
    """Return every file that a checkpoint is made from."""
    return [shipped / name for name in (TRAINING_FILE, TOKENIZER_FILE, *(f"{part}.safetensors" for part in PARTS))]


def shipped_bytes(shipped: Path) -> int:
    """Return the size of the shipped weights on disk."""
    return sum((shipped / f"{part}.safetensors").stat().st_size for part in PARTS)


def _read(shipped: Path, part: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = shipped / f"{part}.safetensors"
    try:
        return {key: value.float() for key, value in load_file(str(path)).items()}
    except (SafetensorError, OSError) as error:
        raise ToolError(
            f"{path} is not a complete safetensors file ({error})", "check out the repository again"
        ) from None


def _fill(module: Any, tensors: dict[str, torch.Tensor], shipped: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ToolError(
            f"{shipped} does not fit its {TRAINING_FILE}: {first}", "check out the repository again"
        ) from None
