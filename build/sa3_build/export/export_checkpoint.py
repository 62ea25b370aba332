"""Export every graph of a checkpoint into an ONNX root; each is checked against its torch module."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sa3_build import memory
from sa3_build.export import load_modules as native, native_weights, text_encoder, torch_to_onnx
from sa3_build.export.model_config import Geometry, load_geometry
from sa3_build.export.probe_sound import probe_sound
from sa3_build.export.wrappers import DecoderContract, DitContract, EncoderContract, TextContract
from sa3_build.graph import io as graph_io
from sa3_build.graph.check_row_files import write_check_rows
from sa3_build.graph.fp32_islands import find_decoder_islands
from sa3_build.passes.base import run_passes
from sa3_build.passes.fp16_mixed import MixPrecision
from sa3_build.passes.null_row import has_null_row
from sa3_build.passes.topological_sort import SortTopologically
from sa3_trt_core.artifacts import files, manifest
from sa3_trt_core.artifacts.build import Draft, build
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.targets import TOKENIZER_FILES, Target, find_target

# Against the torch module in fp32: the DiT by its largest difference over the RMS of the velocity, the others by
# relative L2. Rounding through 24 layers is 1.4e-5 and 1e-6; an error of 1e-6 in a frequency table causes 2.7e-3.
DIT_TOLERANCE = 5e-5
RELATIVE_TOLERANCE = 1e-5
FP16_DECODER_TOLERANCE = 2e-2  # relative L2 of the FP16-mixed decoder: SNR 34 dB
MUSIC_LOOPS, MUSIC_SECONDS = 2, 4
_CODEC_SHAPES = ((1, 32), (1, 45))
CHECK_SHAPES = {
    "dit": ((1, 1), (3, 7), (1, 64)),
    "same-decoder": _CODEC_SHAPES,
    "same-encoder": _CODEC_SHAPES,
    "t5gemma": ((1, 1),),
}


@dataclass(frozen=True)
class Exported:
    """One finished graph, and its error against its torch module."""

    target: str
    path: Path
    nodes: int
    error: float
    reused: bool


class Exporter:
    """Exports of one checkpoint. A module is loaded when its graph is not current, and freed afterwards."""

    def __init__(self, model_dir: Path, onnx_root: Path) -> None:
        """Check the checkpoint. Raises ToolError when the folder is not a native checkpoint."""
        if not model_dir.is_dir():
            raise ToolError(f"no such checkpoint folder: {model_dir}", "give a folder that contains model_config.json")
        self._dir, self._root = model_dir, onnx_root
        self._geometry: Geometry = load_geometry(model_dir / native.CONFIG_FILE)
        self._weights = native.NativeWeights(model_dir / native_weights.WEIGHTS_FILE)
        self._text_dir = model_dir / self._geometry.conditioner.text_folder
        native.check(self._weights, self._geometry)
        for name in ("config.json", "model.safetensors", *(Path(name).name for name in TOKENIZER_FILES)):
            if not (self._text_dir / name).is_file():
                raise ToolError(f"{self._text_dir / name} is missing", "use a complete checkpoint")
        config = {native.CONFIG_FILE: files.sha256_of(model_dir / native.CONFIG_FILE)}
        self._inputs = {**config, native_weights.WEIGHTS_FILE: files.sha256_of(model_dir / native_weights.WEIGHTS_FILE)}

    def text_encoder(self) -> Exported:
        """Export t5gemma/encoder.onnx and copy the tokenizer's files."""
        inputs = {path.name: files.sha256_of(path) for path in sorted(self._text_dir.glob("*.safetensors"))}
        exported = self._export("t5gemma", inputs, lambda: TextContract(text_encoder.load_text_encoder(self._text_dir)))
        for name in TOKENIZER_FILES:
            with files.atomic_path(self._root / name) as temporary:
                shutil.copyfile(self._text_dir / Path(name).name, temporary)
        return exported

    def dit(self) -> Exported:
        """Export sa3-m/dit.onnx."""

        def load() -> nn.Module:
            dit = native.load_dit(self._weights, self._geometry.dit)
            return DitContract(dit, native.load_duration_embedder(self._weights, self._geometry.conditioner))

        return self._export("sa3-m-fp32", self._inputs, load)

    def decoder(self) -> Exported:
        """Export the same-l decoder in fp32."""

        def load() -> nn.Module:
            return DecoderContract(native.load_autoencoder(self._weights, self._geometry.autoencoder))

        return self._export("same-l-decoder-fp32", self._inputs, load)

    def encoder(self) -> Exported:
        """Export the same-l encoder in fp32; it runs once per request, so that 16 bits would save nothing."""

        def load() -> nn.Module:
            return EncoderContract(native.load_autoencoder(self._weights, self._geometry.autoencoder))

        return self._export("same-l-encoder", self._inputs, load)

    def fp16_decoder(self) -> Exported:
        """Convert the fp32 same-l decoder to FP16-mixed and compare the two."""
        source = self._path(find_target("same-l-decoder-fp32"))
        target = find_target("same-l-decoder")
        path = self._path(target)
        inputs = {file.name: files.sha256_of(file) for file in graph_io.files_of(source)}
        settings = {"target": target.name, "tolerance": FP16_DECODER_TOLERANCE}
        with build(path, "onnx", inputs, settings) as draft:
            if draft is None:
                return _reused(target, path)
            model = graph_io.load(source)
            run_passes(model, [SortTopologically(), MixPrecision(find_decoder_islands)])
            written, nodes = graph_io.save(model, path), len(list(model.graph))
            pairs = [
                (self._run_onnx(source, [latent]), self._run_onnx(path, [latent])) for latent in self._music_latents()
            ]
            error = max(relative_error(*pair) for pair in pairs)
            return _keep(target, draft, written, nodes, error, FP16_DECODER_TOLERANCE)

    def _export(self, name: str, inputs: Mapping[str, str], load: Callable[[], nn.Module]) -> Exported:
        target = find_target(name)
        path = self._path(target)
        tolerance = DIT_TOLERANCE if target.kind == "dit" else RELATIVE_TOLERANCE
        settings = {"target": name, "opset": torch_to_onnx.OPSET, "tolerance": tolerance}
        if target.kind == "dit":  # earlier exports treated zero text alone as the null row
            settings["null row"] = "no text and no mask"
        with build(path, "onnx", inputs, settings) as draft:
            return _reused(target, path) if draft is None else self._exported(target, draft, load(), tolerance)

    def _exported(self, target: Target, draft: Draft, module: nn.Module, tolerance: float) -> Exported:
        """Export one module, free it, and compare the graph with the module's outputs."""
        path = draft.output
        # The decoder's samples are compared before rounding to 16 bits, where one in a thousand rounds differently.
        forward = module.waveform if isinstance(module, DecoderContract) else module
        with torch.inference_mode():
            expected = [forward(*example).numpy() for example in self._examples(target)]
        if target.kind in ("same-decoder", "same-encoder"):
            tolerance = max(tolerance, self._rounding(module, expected, target))
        model = torch_to_onnx.export_module(module, target.kind, torch_to_onnx.example_inputs(target.kind))
        written, nodes = graph_io.save(model, path), len(list(model.graph))
        clip = next((str(node.inputs[0].name) for node in model.graph if node.op_type == "Clip" and node.inputs[0]), "")
        # Module, graph and session have the same size: free the first two before the session starts.
        graph_io.release_weights(model)
        del module, model, forward
        self._weights.release()
        memory.release_to_os()
        measure = max_error if target.kind == "dit" else relative_error
        if target.kind == "same-decoder":
            outputs = self._run_samples(path, clip, self._examples(target))
        else:
            outputs = [self._run_onnx(path, example) for example in self._examples(target)]
        error = max(measure(first, second) for first, second in zip(expected, outputs, strict=True))
        return _keep(target, draft, written, nodes, error, tolerance)

    def _music_latents(self) -> list[torch.Tensor]:
        """Return latents (1, C, L) of chords with onsets: a decoder's fp16 error is measured on music, not on noise."""
        autoencoder = native.load_autoencoder(self._weights, self._geometry.autoencoder)
        loops = [torch.from_numpy(probe_sound(seed, MUSIC_SECONDS))[None] for seed in range(MUSIC_LOOPS)]
        with torch.inference_mode():
            return [autoencoder.encode(loop).latents for loop in loops]

    def _rounding(self, codec: nn.Module, expected: list[np.ndarray], target: Target) -> float:
        """Return the error of the autoencoder's own fp32 outputs against fp64.

        Trained sin(pi g) gates amplify rounding to 1e-4, so that another summation order cannot be required to agree
        better.
        """
        exact = codec.double()
        forward = exact.waveform if isinstance(exact, DecoderContract) else exact
        with torch.inference_mode():
            errors = [
                relative_error(forward(example.double()).numpy(), output)
                for (example,), output in zip(self._examples(target), expected, strict=True)
            ]
        codec.float()  # exact: every value was fp32
        return max(errors)

    def _examples(self, target: Target) -> list[list[torch.Tensor]]:
        return [
            torch_to_onnx.example_inputs(target.kind, batch, frames, seed=index + 1)
            for index, (batch, frames) in enumerate(CHECK_SHAPES[target.kind])
        ]

    @staticmethod
    def _run_samples(path: Path, clip: str, examples: list[list[torch.Tensor]]) -> list[np.ndarray]:
        """Return the decoder's samples (1, 2, N) before its Clip."""
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        with OnnxRuntimeEngine(path, graph_io.with_probe_outputs(path, {"samples": clip}), low_memory=True) as engine:
            return [engine.run({"latent": latent})["samples"].numpy() for (latent,) in examples]

    @staticmethod
    def _run_onnx(path: Path, example: list[torch.Tensor]) -> np.ndarray:
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        with OnnxRuntimeEngine(path, low_memory=True) as engine:
            outputs = engine.run(dict(zip(engine.input_names, example, strict=True)))
        return next(iter(outputs.values())).numpy()

    def _path(self, target: Target) -> Path:
        return self._root / target.onnx[0]


def max_error(expected: np.ndarray, output: np.ndarray) -> float:
    """Return the largest absolute difference divided by the RMS of `expected`."""
    reference = expected.astype(np.float64)
    return float(np.abs(reference - output).max() / np.sqrt(np.square(reference).mean()))


def relative_error(expected: np.ndarray, output: np.ndarray) -> float:
    """Return

    output - expected

    /

    expected

    .
    """
    reference = expected.astype(np.float64)
    return float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def _keep(target: Target, draft: Draft, written: list[Path], nodes: int, error: float, tolerance: float) -> Exported:
    """Finish a graph, or remove it if its error exceeds the tolerance. Raises GateError."""
    if not error <= tolerance:
        for file in written:
            file.unlink()
        raise GateError(
            f"{draft.output.name} differs from its source by {error:.2e} (limit {tolerance:g}); it was removed",
            "check the versions against the requirements file, then report this",
        )
    gates: dict[str, Any] = {"error": error}
    if target.kind == "dit":  # its FP16-mixed and FP8 versions get check rows
        gates["null_row"] = has_null_row(graph_io.mapped(draft.output))
    else:
        written = [*written, write_check_rows(draft.output, target.kind, target.precision)]
    draft.finish(written, gates)
    return Exported(target.name, draft.output, nodes, error, reused=False)


def _reused(target: Target, path: Path) -> Exported:
    record = manifest.read_manifest(path)
    assert record is not None
    return Exported(target.name, path, 0, float(record.gates["error"]), reused=True)
