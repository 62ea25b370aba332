"""Queries of the NVIDIA driver: GPU, architecture, memory; without torch or a subprocess."""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

COMPUTE_MAJOR, COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_* of cuda.h
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def has_nvidia_gpu() -> bool:
    """Return True if a usable NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES counts)."""
    return current_arch() is not None


@functools.cache
def current_arch() -> str | None:
    """Return the architecture of the first visible GPU as "sm_89", or None without a GPU or a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_MAJOR, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_MINOR, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return f"sm_{major.value}{minor.value}"


@functools.cache
def open_context() -> None:
    """Start to create the primary context of the first visible GPU; do nothing without a GPU.

    PyTorch, TensorRT and ONNX Runtime use that context. The driver takes 0.4 s for it (H100), in which Python can
    import them.
    """
    if current_arch() is None:
        return

    def retain() -> None:
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    threading.Thread(target=retain, name="sa3-context", daemon=True).start()


@functools.cache
def card_name() -> str | None:
    """Return the name of the first visible GPU ("NVIDIA H100 80GB HBM3"), or None without one."""
    if current_arch() is None:
        return None
    driver, device, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0 or driver.cuDeviceGetName(name, len(name), device) != 0:
        return None
    return name.value.decode("utf-8", "replace")


@functools.cache
def driver_version() -> str:
    """Return the release of the NVIDIA kernel driver ("580.159.04"), or "unknown"."""
    try:
        text = DRIVER_FILE.read_text("utf-8", "replace")
    except OSError:
        return "unknown"
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match is not None else "unknown"


def memory_in_use() -> int | None:
    """Return the bytes in use on the first visible GPU by all processes: PyTorch does not count engines' memory.

    None without a GPU that PyTorch can use.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def tensorrt_module(backend: str) -> ModuleType | None:
    """Return the module of a TensorRT backend, or None; type stubs alone are a package without Builder."""
    try:
        module = importlib.import_module(backend)
    except (ImportError, OSError):
        return None
    return module if hasattr(module, "Builder") else None


@functools.cache
def tensorrt_logger(module: Any) -> Any:
    """Return a logger that stores the last error for the error message, and prints nothing.

    One per process: TensorRT keeps using the first logger it received, and prints to the console once that is freed.
    """

    class Logger(module.ILogger):
        last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.last = message

    return Logger()
