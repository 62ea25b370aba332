"""The machine of a report: card, driver, packages, and what is missing; nothing that names its owner."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Any

from sa3_trt_core import gpu
from sa3_trt_core.artifacts import manifest

PACKAGES = (
    "torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "tensorrt_rtx", "onnx", "onnx-ir",
    "numpy", "diffusers", "transformers", "nvidia-modelopt", "librosa", "scikit-learn", "pyloudnorm", "matplotlib",
    "pytest",
)  # fmt: skip
NEEDED = {  # module -> what it is for
    "torch": "everything", "onnxruntime": "the reference that engines are compared with", "onnx_ir": "making graphs",
    "diffusers": "exporting the demonstration model", "transformers": "exporting its text encoder",
    "pytest": "tests/gpu", "matplotlib": "the validation's plots", "pyloudnorm": "the validation's loudness",
}  # fmt: skip
BACKENDS = ("tensorrt", "tensorrt_rtx", "torch", "onnxruntime")
RTX_ARCHES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")


@dataclass(frozen=True)
class Host:
    """What a report says of its machine. `absent`: backends that cannot run here, with the reason."""

    card: str
    arch: str | None
    driver: str
    packages: dict[str, str]
    missing: dict[str, str]
    backends: tuple[str, ...]
    absent: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        return {
            **vars(self), "backends": list(self.backends), "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(),
        }  # fmt: skip


def this_host() -> Host:
    """Look at the machine; installs nothing."""
    arch = gpu.current_arch()
    absent = {name: why for name in BACKENDS if (why := _absent(name, arch)) is not None}
    return Host(
        card=gpu.card_name() or f"CPU ({platform.machine()})",
        arch=arch,
        driver=gpu.driver_version() if arch is not None else "none",
        packages=dict(manifest.tool_versions(PACKAGES)),
        missing={name: what for name, what in NEEDED.items() if importlib.util.find_spec(name) is None},
        backends=tuple(name for name in BACKENDS if name not in absent),
        absent=absent,
    )


def _absent(backend: str, arch: str | None) -> str | None:
    """Why a backend does not run here, or None when it does."""
    if backend in gpu.TENSORRT_BACKENDS:
        if gpu.tensorrt_module(backend) is None:
            return f"the package {backend} is not installed"
        if arch is None:
            return "no NVIDIA GPU is visible"
        if backend == "tensorrt_rtx" and arch not in RTX_ARCHES:
            return f"TensorRT-RTX does not serve {arch}"
        return None
    return None if importlib.util.find_spec(backend) is not None else f"the package {backend} is not installed"
