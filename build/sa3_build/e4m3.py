"""The FP8 number format E4M3: its limit, and codes with their scale."""

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
    """E4M3 codes that were chosen for one weight, in an .npy file: read when needed, all are half the source."""

    path: Path

    @classmethod
    def write(cls, path: Path, codes: np.ndarray) -> Codes:
        """Whole or not at all; as bytes, for NumPy has no E4M3 of its own."""
        with files.atomic_path(path) as temporary:
            np.save(temporary, codes.view(np.uint8))
        return cls(path)

    def read(self) -> np.ndarray:
        return np.load(self.path, allow_pickle=False).view(E4M3)

    def external(self, folder: Path) -> ir.ExternalTensor:
        """The same as the data of a graph in `folder`, or in a folder above."""
        mapped = np.load(self.path, mmap_mode="r", allow_pickle=False)
        begin, name = self.path.stat().st_size - mapped.nbytes, str(self.path.relative_to(folder))
        kind, shape = ir.DataType.FLOAT8E4M3FN, ir.Shape(mapped.shape)
        return ir.ExternalTensor(name, begin, mapped.nbytes, kind, shape=shape, name=name, base_dir=folder)


def quantized(weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """E4M3 codes of weight / scale, rounded to nearest even and saturated at +-448. scale is one number a channel."""
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    ratio = weight.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)
