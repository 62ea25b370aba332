"""Select the GPUs of this process or of workers, by environment variables set before CUDA is initialized."""

from __future__ import annotations

import ctypes
import os

from sa3_trt_core.errors import ToolError

CPU = "cpu"
VISIBLE = "CUDA_VISIBLE_DEVICES"
MAX_DIGITS, SHOWN = 4, 40  # digits of a device index; letters of a name in a message


def parse_devices(text: str) -> tuple[str, ...]:
    """Parse "0,1": distinct indices of visible GPUs, or cpu, which may repeat. Raises ToolError."""
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
    """Select device `one` for this process, or return the devices `several` for workers. Raises ToolError."""
    if one is not None and several is not None:
        raise ToolError("--device and --devices cannot be combined", "choose one of the two")
    if one is not None:
        if "," in one:
            raise ToolError(f"--device {one} names more than one", "use --devices")
        use_device(*parse_devices(one))
    return parse_devices(several) if several is not None else ()


def use_device(name: str) -> None:
    """Make one GPU visible to this process, or none for "cpu". Must run before CUDA is initialized."""
    if VISIBLE not in os.environ:
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of nvidia-smi; CUDA's default is fastest first
    os.environ[VISIBLE] = "" if name == CPU else visible_devices()[int(name)]


def visible_devices() -> list[str]:
    """Return CUDA's names (indices or UUIDs) of the GPUs visible to this process."""
    chosen = os.environ.get(VISIBLE)
    if chosen is not None:
        return [part.strip() for part in chosen.split(",") if part.strip()]
    return [str(number) for number in range(_count())]


def _count() -> int:
    """Return the number of GPUs from NVML: a CUDA query would fix the devices of this process."""
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
