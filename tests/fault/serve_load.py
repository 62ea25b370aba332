"""Acceptance of the service on a local model: many clients, bit-equal sounds, malformed requests, disconnects.

    PYTHONPATH=tests python tests/fault/serve_load.py --onnx-root output/demo/onnx --work D

Prints one JSON document; exit 1 if a requirement is not met.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helpers.service import Service, serving

LEAK_BYTES = 50_000_000
LEAVERS = 20


def requests(count: int, longest: float) -> list[dict[str, Any]]:
    """Return requests of mixed length, format and seed."""
    draw = random.Random(18)
    drawn: list[dict[str, Any]] = []
    for number in range(count):
        fields: dict[str, Any] = {"prompt": draw.choice(["piano", "techno", "rain", "bells"]), "seed": number}
        fields |= {"seconds": round(draw.uniform(0.5, longest), 2), "steps": draw.choice([2, 4])}
        fields |= {"format": draw.choice(["wav", "flac"])}
        if draw.random() < 0.25:
            fields["cfg"] = 3.0
        drawn.append(fields)
    return drawn


def load(service: Service, clients: int, each: int, longest: float) -> tuple[dict[str, Any], list[Any]]:
    """Let every client send its requests one after the other; return figures and (request, sound) pairs."""
    planned = requests(clients * each, longest)

    def client(number: int) -> list[Any]:
        responses = []
        for fields in planned[number::clients]:
            started = time.perf_counter()
            answer = service.generate(**fields)
            responses.append((fields, answer.status_code, time.perf_counter() - started, answer.content))
        return responses

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [response for part in pool.map(client, range(clients)) for response in part]
    elapsed = time.perf_counter() - started
    times = sorted(taken for _, _, taken, _ in answers)
    rate = len(answers) / elapsed
    p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
    figures = {
        "requests": len(answers), "lost": sum(status != 200 for _, status, _, _ in answers), "sounds_per_second": rate,
        "p50_seconds": times[len(times) // 2], "p99_seconds": p99, "owed_p99_seconds": 1.5 * clients / rate,
    }  # fmt: skip
    return figures, [(fields, data) for fields, _, _, data in answers]


def unequal(root: Path, precision: str, sounds: list[Any], work: Path) -> int:
    """Return the number of sounds that differ in any byte from those of one sa3_trt process with --prompts-file."""
    wrong = 0
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for fields, data in sounds:
        groups.setdefault((fields["steps"], fields.get("cfg", 1.0), fields["format"]), []).append((fields, data))
    for number, ((steps, cfg, kind), rows) in enumerate(groups.items()):
        prompts, out = work / f"{number}.jsonl", work / str(number)
        lines = [{name: fields[name] for name in ("prompt", "seed", "seconds")} for fields, _ in rows]
        prompts.write_text("\n".join(map(json.dumps, lines)) + "\n")
        argv = [sys.executable, "-m", "sa3_trt", "--prompts-file", prompts, "--out-dir", out, "--steps", steps]
        argv += ["--cfg", cfg, "--format", kind, "--precision", precision, "--onnx-root", root, "--quiet"]
        subprocess.run(
            [str(word) for word in [*argv, "--backend", "onnxruntime"]], check=True, stdout=subprocess.DEVNULL
        )
        made = sorted(out.iterdir())
        wrong += sum(path.read_bytes() != data for path, (_, data) in zip(made, rows, strict=True))
    return wrong


def leave(service: Service) -> dict[str, float]:
    """Close clients' connections during generation; return the steps until all slots are free."""
    body = json.dumps({"prompt": "x", "seconds": 5, "steps": 100, "seed": 1}).encode()
    head = f"POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    clients = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(LEAVERS)]
    for client in clients:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    service.until_metric("sa3_ring_requests", service.metric("sa3_ring_places"))
    steps, started = service.metric("sa3_ring_steps"), time.perf_counter()
    for client in clients:
        client.close()
    service.until_metric("sa3_ring_requests", 0)
    return {
        "clients": LEAVERS, "steps_until_free": service.metric("sa3_ring_steps") - steps,
        "seconds_until_free": time.perf_counter() - started,
    }  # fmt: skip


def resident(service: Service) -> int:
    """Return the server's resident memory in bytes."""
    return int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]) * 4096


def main() -> int:
    """Run the test and print its figures; return 1 if a requirement is not met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnx-root", type=Path, required=True)
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--longest", type=float, default=3.0, metavar="S")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    from fault.malformed import send_malformed

    args.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    with serving(
        args.onnx_root, "--precision", args.precision, "--body-seconds", 1.5, "--max-body", 4 << 20
    ) as service:
        report["load"], sounds = load(service, args.clients, args.requests, args.longest)
        report["leave"] = leave(service)
        before = resident(service)
        report["malformed"] = send_malformed(service, args.malformed)
        report["malformed"]["grown_bytes"] = resident(service) - before
        report["then"] = service.generate(prompt="a", seconds=0.5, steps=1).status_code
        report["exit_code"] = service.stop()
    report["load"]["unequal"] = unequal(args.onnx_root, args.precision, sounds, args.work)
    print(json.dumps(report, indent=2))
    load_figures, malformed = report["load"], report["malformed"]
    met = (
        load_figures["lost"] == 0
        and load_figures["unequal"] == 0
        and load_figures["p99_seconds"] <= load_figures["owed_p99_seconds"]
    )
    met &= malformed["server_errors"] == 0 and malformed["grown_bytes"] < LEAK_BYTES and report["then"] == 200
    return 0 if met and report["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
