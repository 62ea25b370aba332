"""The machine of a report: card, driver, installed and missing packages; without personal data."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from typing import Any

from sa3_trt_core import engines, gpu
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
BACKENDS = tuple(engines.BACKENDS)


@dataclass(frozen=True)
class Host:
    """Machine of a report. `absent`: backends that cannot run here, with the reason.

    `on_cpu`: backends that run without the installed card, such as an ONNX Runtime without CUDA.
    """

    card: str
    arch: str | None
    driver: str
    packages: dict[str, str]
    missing: dict[str, str]
    backends: tuple[str, ...]
    absent: dict[str, str]
    on_cpu: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of report.json."""
        return {
            **vars(self), "backends": list(self.backends), "on_cpu": list(self.on_cpu),
            "python": platform.python_version(), "cpus": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        }  # fmt: skip


def this_host() -> Host:
    """Return the description of this machine. Installs nothing."""
    arch = gpu.current_arch()
    absent = {name: why for name in BACKENDS if (why := _absent(name, arch)) is not None}
    present = tuple(name for name in BACKENDS if name not in absent)
    return Host(
        card=gpu.card_name() or f"CPU ({platform.machine()})",
        arch=arch,
        driver=gpu.driver_version() if arch is not None else "none",
        packages=dict(manifest.tool_versions(PACKAGES)),
        missing={name: what for name, what in NEEDED.items() if importlib.util.find_spec(name) is None},
        backends=present,
        absent=absent,
        on_cpu=tuple(name for name in present if arch is not None and not engines.BACKENDS[name].on_gpu()),
    )


def _absent(backend: str, arch: str | None) -> str | None:
    """Return the reason for which a backend cannot run here, or None when it can."""
    record = engines.BACKENDS[backend]
    if not record.available():
        return f"the package {record.package} is not installed"
    if record.suffix is None or (arch is None and record.on_cpu):
        return None
    if arch is None:
        return "no NVIDIA GPU is visible"
    return None if arch in record.arches else f"{record.label} does not serve {arch}"
