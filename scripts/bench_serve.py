"""Time sa3_serve and the same engines without a server: latency of one client, throughput of many."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from sa3_trt_core import engines, shapes, targets
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, folder_argv, integer_type, number_type, run_command
from sa3_trt_core.errors import ToolError
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.request import Request

READY_SECONDS = 300  # for the server's first sound


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(prog="bench_serve.py", description=__doc__)
    parser.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="model (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=targets.PRECISIONS, default="fp8", help="precision of the DiT (default: %(default)s)"
    )
    parser.add_argument("--backend", default=engines.AUTO, help="backend, as in sa3_trt (default: %(default)s)")
    add_folder_flags(parser)
    parser.add_argument("--seconds", type=number_type(shapes.MIN_SECONDS, 374, "seconds"), default=30.0, metavar="S",
                        help="length of every sound (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--steps", type=integer_type(1, 1000, "steps"), default=8, help="sampler steps (default: %(default)s)"
    )
    parser.add_argument(
        "--depth", type=integer_type(1, 64, "places"), default=8, help="depth of ring and server (default: %(default)s)"
    )
    parser.add_argument(
        "--clients", type=integer_type(1, 1000), default=16, help="number of concurrent clients (default: %(default)s)"
    )
    parser.add_argument("--sounds", type=integer_type(1, 100_000), default=160, metavar="N",
                        help="number of timed sounds, of all clients together (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--repeats",
        type=integer_type(1, 10_000),
        default=20,
        help="number of timed sounds of one client (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Time the generator and its ring, then the server; print one JSON document. Raises ToolError."""
    args = make_parser().parse_args(argv)
    from sa3_bench.ring_rate import PROMPT, quantile

    request = Request(PROMPT, args.seconds, steps=args.steps)
    alone_ms, ring_rate = _without_server(args, request)
    with _server(args) as port:
        client_ms = _median_ms(lambda seed: _ask(port, request, seed), args.repeats)
        with ThreadPoolExecutor(args.clients) as pool:
            # As `measure_ring` does: graphs of 2, 3, ... rows are captured before the clock starts.
            list(pool.map(partial(_ask, port, request), range(2 * args.depth)))
            began = time.perf_counter()
            times = sorted(pool.map(lambda seed: _timed(partial(_ask, port, request, seed)), range(args.sounds)))
        rate = args.sounds / (time.perf_counter() - began)
    report = {
        "seconds": args.seconds, "steps": args.steps, "depth": args.depth, "clients": args.clients,
        "generate_ms": alone_ms, "one_client_ms": client_ms, "overhead_ms": client_ms - alone_ms,
        "ring_sounds_per_second": ring_rate, "server_sounds_per_second": rate, "share_of_ring": rate / ring_rate,
        "p50_seconds": quantile(times, 0.5), "p99_seconds": quantile(times, 0.99),
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    return 0


def _without_server(args: argparse.Namespace, request: Request) -> tuple[float, float]:
    """Return the milliseconds of `generate`, and the sounds per second of a ring, in this process."""
    from sa3_bench.ring_rate import measure_ring
    from sa3_trt_core.model_loader import make_plan
    from sa3_trt_core.pipeline import Generator

    source = ModelSource.of(args.onnx_root, args.models_dir)
    with Generator.open(make_plan(args.dit, args.precision, args.backend, source)) as generator:
        alone_ms = _median_ms(lambda seed: generator.generate(replace(request, seed=seed)), args.repeats)
        return alone_ms, measure_ring(generator, request, args.depth, args.sounds).rate


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[int]:
    """Run sa3_serve on a free port of this machine inside the block; yields the port once the service is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    line = [sys.executable, "-m", "sa3_serve.command", "--port", str(port), "--dit", args.dit, "--text-only"]
    line += ["--precision", args.precision, "--backend", args.backend, "--depth", str(args.depth)]
    line += ["--queue", str(4 * args.clients), *folder_argv(args)]
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment)
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise ToolError("sa3_serve did not become ready", "run it alone and read its output")


def _ask(port: int, request: Request, seed: int) -> bytes:
    """Return one sound from the server, as 16-bit WAV. Raises ToolError for any other answer."""
    body = {"prompt": request.prompt, "seconds": request.seconds, "steps": request.steps, "seed": seed, "format": "wav"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_SECONDS)
    try:
        connection.request("POST", "/v1/audio/generate", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise ToolError(f"the server returned status {answer.status}", data.decode("utf-8", "replace")[:200])
    return data


def _timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _median_ms(work: Callable[[int], object], repeats: int) -> float:
    """Return the median milliseconds of calls with the seeds 0, 1, ...; a warm call of each kind comes first."""
    for seed in range(2):
        work(seed)
    return 1e3 * statistics.median(_timed(partial(work, seed)) for seed in range(repeats))


if __name__ == "__main__":
    sys.exit(run_command(main))
