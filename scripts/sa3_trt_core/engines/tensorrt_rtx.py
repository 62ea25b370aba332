"""The backend tensorrt_rtx: TensorRT's API for RTX GPUs, whose builder needs no GPU."""

from __future__ import annotations

import functools

from sa3_trt_core import gpu
from sa3_trt_core.engines.backend import Backend
from sa3_trt_core.engines.tensorrt import open_tensorrt

BACKEND = Backend(
    name="tensorrt_rtx",
    label="TensorRT-RTX",
    package="tensorrt_rtx",
    open=functools.partial(open_tensorrt, "tensorrt_rtx"),
    suffix=".rtx",
    arches=("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
    builds_elsewhere=True,
    find_package=gpu.tensorrt_module,
    refits=True,
)
