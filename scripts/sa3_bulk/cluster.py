"""Connection to Ray: a running cluster, or a local one that ends with the job."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sa3_trt_core.cli.devices import CPU, VISIBLE
from sa3_trt_core.cli.parser import LOCAL_RAY as LOCAL
from sa3_trt_core.errors import ToolError

ANSWER_SECONDS = 5.0
HINT = "give the HOST:PORT that `ray start` printed, or auto for a Ray of this machine"
MIN_STORE = 80_000_000  # bytes of shared memory: Ray's minimum, as sounds go to files and not through it


def require_ray(flag: str) -> None:
    """Raise ToolError unless Ray is installed."""
    if importlib.util.find_spec("ray") is None:
        raise ToolError(
            f"{flag} needs Ray, which is not installed",
            "pip install 'sa3-trt[ray]', or run one command per device with --device N and --shard I/OF",
        )


@contextmanager
def connected(address: str, devices: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Connect to the Ray of an address, or start a local one for some devices; return the resources of each worker.

    `devices` are those of --devices, empty for all. Neither dashboard nor usage statistics are started, and a Ray of
    this machine listens on 127.0.0.1 only. Raises ToolError.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the worker sets its visible devices itself
    if address == LOCAL or _is_loopback(address):
        # By default Ray replaces the loopback address by an external one and listens to the network.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address != LOCAL:
        _require_listener(address)
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if address == LOCAL:
            gpus = _gpus(devices)
            cpus = max(len(devices), os.cpu_count() or 1)
            ray.init(
                address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, _node_ip_address="127.0.0.1",
                object_store_memory=MIN_STORE, **options,
            )  # fmt: skip
        else:
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ToolError(
            f"no Ray answers at {address}: {reason}", "give the HOST:PORT that `ray start` printed"
        ) from None
    try:
        yield _of_devices(devices) if devices else _of_nodes(ray.nodes())
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise ToolError unless something listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in host:
        if address != "auto":
            raise ToolError(f"--ray {address} is no HOST:PORT", HINT)
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ToolError(f"no Ray answers at {address}: {getattr(error, 'strerror', None) or error}", HINT) from None


def _gpus(devices: Sequence[str]) -> int:
    """Return the number of GPUs of a local Ray; with --devices it is limited to those."""
    from sa3_trt_core.cli import devices as visible

    numbers = [int(name) for name in devices if name != CPU]
    if not devices:
        return len(visible.visible_devices())
    if numbers:
        os.environ[VISIBLE] = ",".join(visible.visible_devices()[number] for number in numbers)
    return len(numbers)


def _of_devices(devices: Sequence[str]) -> list[dict[str, Any]]:
    return [{"num_cpus": 1, "num_gpus": 0 if name == CPU else 1} for name in devices]


def _of_nodes(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one worker's resources per GPU; per node in a cluster without GPUs, where the backend uses all cores."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(resources.get("GPU", 0) for resources in alive))
    if gpus:
        return [{"num_cpus": 1, "num_gpus": 1} for _ in range(gpus)]
    usable = [resources for resources in alive if resources.get("CPU", 0) >= 1]
    if not usable:
        raise ToolError(
            "the cluster has neither a GPU nor a CPU to give", "start its nodes with --num-cpus or --num-gpus"
        )
    return [{"num_cpus": 1, "num_gpus": 0, "scheduling_strategy": "SPREAD"} for _ in usable]


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
