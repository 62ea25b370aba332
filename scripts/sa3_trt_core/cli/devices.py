"""Choosing the GPU of a process, and the GPUs of several: said in the environment before anything asks the driver."""

from __future__ import annotations

import ctypes
import os

from sa3_trt_core.errors import ToolError

CPU = "cpu"
VISIBLE = "CUDA_VISIBLE_DEVICES"
MAX_DIGITS, SHOWN = 4, 40  # of a device's number, and of a name in a message


def parse_devices(text: str) -> tuple[str, ...]:
    """ "0,1" as devices: numbers of visible GPUs, each once, or cpu as often as you like. Raises ToolError."""
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name != CPU and not (name.isascii() and name.isdigit() and len(name) <= MAX_DIGITS):
            raise ToolError(
                f"{name[:SHOWN]!r} is not a device", "give numbers of GPUs, as nvidia-smi -L counts them, or cpu"
            )
        if name != CPU and names.count(name) > 1:
            raise ToolError(f"device {name} is named twice", "name each GPU once")
    visible = visible_devices()
    for name in names:
        if name != CPU and int(name) >= len(visible):
            available = f"{len(visible)} visible" if visible else "none"
            raise ToolError(f"there is no GPU {name} here: {available}", "see nvidia-smi -L, or take cpu")
    return names


def choose_devices(one: str | None, several: str | None) -> tuple[str, ...]:
    """Take `one` device for this process, or give the names of `several` for others. Raises ToolError."""
    if one is not None and several is not None:
        raise ToolError("--device and --devices cannot be combined", "choose one of the two")
    if one is not None:
        if "," in one:
            raise ToolError(f"--device {one} names more than one", "use --devices")
        use_device(*parse_devices(one))
    return parse_devices(several) if several is not None else ()


def use_device(name: str) -> None:
    """Let this process see one GPU, or none for cpu. Only before anything has asked the driver."""
    if VISIBLE not in os.environ:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts; CUDA itself puts the fastest first
    os.environ[VISIBLE] = "" if name == CPU else visible_devices()[int(name)]


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them."""
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return [part.strip() for part in chosen.split(",") if part.strip()]
    return [str(number) for number in range(_count())]


def _count() -> int:
    """Return the number of GPUs, by the management library: a query to CUDA would fix this process's devices."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0:
        return 0
    status = library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return count.value if status == 0 else 0
