"""Time a new sa3_trt process to its first WAV, with and without cached kernels, on engines of random weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sa3_bench.generation import Subject
from sa3_trt_core import gpu, paths
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.engines.packed import CACHE_VARIABLE
from sa3_trt_core.engines.torch import BACKEND
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import TOKENIZER_FILES, find_target
from sa3_trt_core.torch_models.dit import weights as dit_weights
from sa3_trt_core.torch_models.same import weights as same_weights
from sa3_trt_core.torch_models.t5gemma import weights as text_weights

COMMAND = Path(__file__).resolve().parents[1] / "sa3_trt.py"
WORDS = ("slow", "piano", "over", "soft", "strings")


def write_engines(subject: Subject, folder: Path) -> None:
    """Write the engines of text encoder, FP8 DiT and decoder, and a tokenizer of a few words."""
    from safetensors.torch import save_file

    dit, decoder, text = subject.packed_dit("fp8"), subject.packed_decoder("fp16"), subject.packed_text()
    arch = gpu.current_arch() or paths.NO_GPU
    for name, tensors, header in (
        ("sa3-m-fp8", dit.tensors, dit_weights.header(dit.sizes)),
        ("same-l-decoder", decoder.tensors, same_weights.header(decoder.sizes)),
        ("t5gemma", text.tensors, text_weights.header(text.sizes)),
    ):
        path = BACKEND.engine_path(folder / "models", arch, find_target(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.clone() for key, value in tensors.items()}, str(path), metadata=header)
        manifest.write_manifest(path, "engine", [path], {}, {"target": name, "backend": BACKEND.name}, {})
    _write_tokenizer(folder / "onnx")


def starts(folder: Path, seconds: float) -> dict[str, float]:
    """Return the seconds from the start of a new process to its WAV: without cached kernels, then with all of them."""
    argv = [sys.executable, str(COMMAND), "--prompt", " ".join(WORDS), "--precision", "fp8", "--backend", "torch"]
    argv += ["--seconds", str(seconds), "--seed", "0", "--json", "--quiet", "--onnx-root", str(folder / "onnx")]
    argv += ["--models-dir", str(folder / "models"), "--out", str(folder / "sound.wav")]
    seconds_by_name: dict[str, float] = {}
    for kind in ("none kept", "kernels kept"):
        began = time.perf_counter()
        done = subprocess.run(
            argv, stdout=subprocess.PIPE, env=os.environ | {CACHE_VARIABLE: str(folder / "kernels")}, check=False
        )
        seconds_by_name[f"fresh process to its first WAV, {kind}"] = time.perf_counter() - began
        if done.returncode:
            raise ToolError(f"sa3_trt ended with {done.returncode}", f"run it alone: {' '.join(argv)}")
        stages: dict[str, Any] = json.loads(done.stdout)["timings"]
        seconds_by_name.update({f"{kind}: {stage}": float(value) for stage, value in stages.items()})
    return seconds_by_name


def _write_tokenizer(root: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(("<pad>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    first, second = (root / name for name in TOKENIZER_FILES)
    first.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(first))
    second.write_text(json.dumps({"pad_token": "<pad>", "padding_side": "right"}), encoding="utf-8")


def release() -> None:
    """Free this process's GPU memory for the processes that are started next."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
