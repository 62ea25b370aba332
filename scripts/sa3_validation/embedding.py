"""Embed sounds with a local ONNX file: additional features for the two-sample test. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import SAMPLE_RATE

KINDS = ("onnx",)
RATE_PROPERTY = "sample_rate"  # metadata key of the file: input rate in Hz, default 44,100
RANKS = {1: (), 2: (1,), 3: (1, 1)}  # axes before the samples of a mono input


class Embedder:
    """Network from samples to a vector: one float input (N), (1, N), (1, 1, N) or (1, 2, N); its first output is used.

    An output with a time axis is averaged over all axes but the last.
    """

    def __init__(self, path: Path) -> None:
        """Load the file. Raises ToolError when it is absent, does not load, or has another input."""
        import onnxruntime

        hint = "give a network of one float input (1, N), (1, 1, N) or (1, 2, N)"
        if not path.is_file():
            raise ToolError(f"--embedder: file not found: {path}", hint)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors reach the user as ToolError, once
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise ToolError(f"--embedder: ONNX Runtime cannot load {path}: {str(error)[-200:]}", hint) from None
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) not in RANKS:
            signature = ", ".join(f"{node.name} {node.type} {node.shape}" for node in inputs)
            raise ToolError(f"--embedder: {path} has unsupported inputs: {signature}", hint)
        self._name, self._shape = inputs[0].name, list(inputs[0].shape)
        properties = self._session.get_modelmeta().custom_metadata_map
        rate = properties.get(RATE_PROPERTY, str(SAMPLE_RATE))
        if not rate.isdigit() or not 8000 <= int(rate) <= 192_000:
            raise ToolError(
                f"--embedder: {path} has unsupported sample rate {rate!r}",
                f"set {RATE_PROPERTY} (8000 to 192000 Hz) in its metadata",
            )
        self._rate, self._path = int(rate), path
        self.identity = files.sha256_of(path)

    def embed(self, samples: NDArray[Any]) -> NDArray[np.float64]:
        """Return the vector (D,) of a sound (N, 2) at 44.1 kHz. Raises ToolError when the network fails on it."""
        import soxr

        sound = np.asarray(samples, np.float32)
        stereo = len(self._shape) == 3 and self._shape[1] == 2
        if not stereo:
            sound = sound.mean(axis=1, keepdims=True)
        if self._rate != SAMPLE_RATE:
            sound = soxr.resample(sound, SAMPLE_RATE, self._rate)
        shape = (1, 2) if stereo else RANKS[len(self._shape)]
        input_array = np.ascontiguousarray(sound.T).reshape(*shape, -1)
        try:
            output = self._session.run(None, {self._name: input_array})[0]
        except Exception as error:
            raise ToolError(
                f"--embedder: {self._path} failed on a sound: {str(error)[-200:]}", "give another network"
            ) from None
        vector = np.asarray(output, np.float64)
        vector = vector.reshape(-1, vector.shape[-1]).mean(axis=0) if vector.ndim > 1 else np.atleast_1d(vector)
        if not np.isfinite(vector).all():
            raise ToolError(f"--embedder: {self._path} returns values that are not finite", "give another network")
        return vector
