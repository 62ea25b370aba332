"""Run a server on tiny models in a subprocess, and the equivalent command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile

START_SECONDS, END_SECONDS = 180, 90
PROMETHEUS = re.compile(r"^(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class Service:
    """A running server: address, client, process and the lines that it has printed."""

    def __init__(self, process: subprocess.Popen[str], address: str, lines: list[str], token: str | None) -> None:
        self.process, self.address, self.lines = process, address, lines
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=address, headers=headers, timeout=300, trust_env=False)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def generate(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/audio/generate", json=fields)

    def metric(self, name: str, labels: str = "") -> float:
        """Return a value of /metrics, 0 if it does not exist yet."""
        value_by_name = {(m[1], m[2] or ""): float(m[3]) for m in PROMETHEUS.finditer(self.client.get("/metrics").text)}
        return value_by_name.get((name, labels), 0.0)

    def until_metric(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def stop(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)


@contextlib.contextmanager
def serving(root: Path, *more: object, token: str | None = None) -> Iterator[Service]:
    """A server of the tests' model that is ready; it is ended with the block if it has not ended."""
    argv = ["--onnx-root", root, "--backend", "onnxruntime", "--precision", "fp32", "--port", 0, *more]
    with started(argv, token=token) as service:
        yield service


@contextlib.contextmanager
def started(words: Sequence[object], folder: Path | None = None, token: str | None = None) -> Iterator[Service]:
    """Run `sa3_serve` with these words in a folder until it is ready; it is ended with the block."""
    argv = [sys.executable, "-m", "sa3_serve.command", *(str(word) for word in words)]
    process = subprocess.Popen(argv, cwd=folder, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_PROXY": "*"})
    lines: list[str] = []
    listening = threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for text in process.stderr:
            lines.append(text.rstrip("\n"))
            if text.startswith("listening on "):
                listening.set()
        listening.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert listening.wait(START_SECONDS), lines
        address = next((text.rpartition(" ")[2] for text in lines if text.startswith("listening on ")), None)
        assert address is not None, lines
        service = Service(process, address, lines, token)
        deadline = time.monotonic() + START_SECONDS
        while service.client.get("/healthz").status_code != 200:
            assert time.monotonic() < deadline and process.poll() is None, lines
            time.sleep(0.05)
        yield service
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def samples(data: bytes) -> np.ndarray:
    """Return the 16-bit samples (n, 2) of a sound file's bytes."""
    pcm, _ = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    return np.asarray(pcm)


def comment(data: bytes) -> dict[str, Any]:
    """Return the generation settings stored in a sound file's comment."""
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        settings: dict[str, Any] = json.loads(sound.comment)
        return settings
