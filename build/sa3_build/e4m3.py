"""FP8 E4M3 codes: rounding weights to them and storing them on disk.

E4M3 is an 8-bit float with 4 exponent and 3 mantissa bits: 1 + 3 significant bits, largest value 448, no infinity. Its
254 finite values are dense near zero and coarse near 448 (steps of 32). A tensor is therefore stored as
    value ~ scale * code,    code = round_to_e4m3(clip(value / scale, -448, 448))
with scale = amax / 448, so that the largest magnitude (amax) becomes the largest code. Weights have one scale per
output channel, activations one scale per tensor. The matrix multiplication runs on codes and accumulates in higher
precision; its result is multiplied by both scales afterwards (DequantizeLinear in the graph). The relative rounding
error is at most 2^-4 for normal codes. Values below 2^-6 * scale become subnormal and lose bits, values below 2^-10 *
scale become 0, and values above amax saturate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sa3_trt_core.artifacts import files
from sa3_trt_core.number_formats import E4M3_MAX

SUFFIX = "_e4m3"

E4M3 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True)
class Codes:
    """E4M3 codes of one weight, stored in an .npy file and read when needed.

    All codes of a DiT together are half its fp16 size.
    """

    path: Path

    @classmethod
    def write(cls, path: Path, codes: np.ndarray) -> Codes:
        """Write codes to an .npy file, atomically; as bytes, because NumPy has no E4M3 dtype."""
        with files.atomic_path(path) as temporary:
            np.save(temporary, codes.view(np.uint8))
        return cls(path)

    def read(self) -> np.ndarray:
        """Return the codes, an array of E4M3."""
        return np.load(self.path, allow_pickle=False).view(E4M3)

    def external(self, folder: Path) -> ir.ExternalTensor:
        """Return the codes as external tensor data of a graph in `folder` or in a parent of it."""
        mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        begin, name = self.path.stat().st_size - mapped.nbytes, str(self.path.relative_to(folder))
        kind, shape = ir.DataType.FLOAT8E4M3FN, ir.Shape(mapped.shape)
        return ir.ExternalTensor(name, begin, mapped.nbytes, kind, shape=shape, name=name, base_dir=folder)


def quantized(weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """Return the E4M3 codes of weight / scale, rounded to nearest even and saturated at +-448.

    `scale` has one entry, or one per channel along `axis`.
    """
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    ratio = weight.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)
