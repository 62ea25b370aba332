"""The runtime library of Stable Audio 3 on NVIDIA GPUs: tables, files, engines, sampler.

    from sa3_trt_core import Generator, Request

    with Generator.load("medium", precision="fp8") as generator:
        result = generator.generate(Request("slow piano, 70 BPM", seconds=54, seed=1))
        result.save("piano.wav")

`result.audio` is fp32 (samples, 2) at `result.sample_rate`, `result.waveform` the same as (2, samples). User errors
raise ToolError. Importing this package loads no other module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sa3_trt_core.version import __version__

if TYPE_CHECKING:
    from sa3_trt_core.errors import GateError, ToolError
    from sa3_trt_core.pipeline import Generator
    from sa3_trt_core.request import Request
    from sa3_trt_core.result import Result

__all__ = ["GateError", "Generator", "Request", "Result", "ToolError", "__version__"]

_HOMES = {
    "GateError": "errors", "Generator": "pipeline", "Request": "request", "Result": "result", "ToolError": "errors"
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Return a name of the public API, imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
