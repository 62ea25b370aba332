"""The service on tiny models: same sounds as sa3_trt, authorisation, refusals, disconnects, shutdown."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_serve
import numpy as np
import pytest
import soundfile

import sa3_trt
from helpers.commands import CommandResult, assert_user_error, run
from helpers.service import Service, comment, samples, serving

LONG = {"prompt": "endless", "seconds": 1.0, "steps": 100, "seed": 1}


@pytest.fixture(scope="module")
def service(tiny_onnx: Path) -> Iterator[Service]:
    with serving(tiny_onnx, "--depth", 4, "--queue", 40, "--max-body", 400_000, "--body-seconds", 1.5) as server:
        yield server


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (44_100, 2)), 44_100, subtype="PCM_16")
    return path


def by_command(root: Path, out: Path, fields: dict[str, Any], init_audio: Path | None = None) -> bytes:
    """Return the file that sa3_trt writes for the fields of a request."""
    line: list[object] = [
        "--onnx-root",
        root,
        "--backend",
        "onnxruntime",
        "--precision",
        "fp32",
        "--quiet",
        "--out",
        out,
    ]
    names = {"inpaint": "inpaint-range"}
    for name, value in fields.items():
        if name == "inpaint":
            value = ",".join(str(bound) for bound in value[0])
        if name != "format":
            line += [f"--{names.get(name, name).replace('_', '-')}", value]
    if init_audio is not None:
        line += ["--init-audio", init_audio]
    result = run(sa3_trt.main, line)
    assert result.code == 0, result.err
    return out.read_bytes()


def test_many_clients_get_the_sounds_of_the_command_to_the_bit(
    service: Service, tiny_onnx: Path, sound: Path, tmp_path: Path
) -> None:
    kinds: list[tuple[dict[str, Any], Path | None]] = [
        ({"prompt": "slow piano", "seconds": 1.0, "seed": 3, "steps": 3}, None),
        ({"prompt": "techno", "seconds": 2.3, "seed": 4, "steps": 2, "format": "flac"}, None),
        ({"prompt": "bells", "seconds": 0.7, "seed": 5, "steps": 4, "cfg": 3.0, "negative_prompt": "harsh"}, None),
        ({"prompt": "rain", "seconds": 1.0, "seed": 6, "steps": 2, "init_noise_level": 0.6}, sound),
        ({"prompt": "rain", "seconds": 1.0, "seed": 7, "steps": 2, "inpaint": [(0.3, 0.8)]}, sound),
    ]

    def ask(kind: tuple[dict[str, Any], Path | None]) -> bytes:
        fields, init_audio = kind
        if init_audio is None:
            answer = service.generate(**fields)
        else:
            form = {name: str(value) for name, value in fields.items() if name != "inpaint"}
            form |= {"inpaint": "0.3,0.8"} if "inpaint" in fields else {}
            files = {"init_audio": ("a.wav", init_audio.read_bytes())}
            answer = service.client.post("/v1/audio/generate", data=form, files=files)
        assert answer.status_code == 200, answer.text
        assert json.loads(answer.headers["x-sound"])["seed"] == fields["seed"]
        return answer.content

    with ThreadPoolExecutor(16) as clients:
        sounds = list(clients.map(ask, kinds * 2))
    for index, (fields, init_audio) in enumerate(kinds):
        out = tmp_path / f"{index}.{fields.get('format', 'wav')}"
        expected = by_command(tiny_onnx, out, fields, init_audio)
        for data in sounds[index :: len(kinds)]:
            if init_audio is None:
                assert data == expected
            assert np.array_equal(samples(data), samples(expected))  # the path of the input sound differs
            assert comment(data) == {key: value for key, value in comment(expected).items() if key != "init_audio"}
        assert np.abs(samples(expected)).max() > 300 and comment(expected)["seed"] == fields["seed"]
    assert service.metric("sa3_requests_total", 'status="200"') >= 10
    assert service.metric("sa3_stage_seconds_count", 'stage="decode"') >= 10


@pytest.mark.parametrize("kind", ["mp3", "ogg"])
def test_lossy_formats(service: Service, kind: str) -> None:
    answer = service.generate(prompt="a", seconds=1, steps=1, seed=1, format=kind)
    assert answer.status_code == 200 and comment(answer.content)["prompt"] == "a"
    lossless = samples(service.generate(prompt="a", seconds=1, steps=1, seed=1).content).astype(float)
    lossy = samples(answer.content)[: len(lossless)].astype(float)
    assert np.corrcoef(lossless[: len(lossy)].ravel(), lossy.ravel())[0, 1] > 0.5


def test_a_stream_is_the_wav_of_windows_as_they_are_decoded(service: Service, tiny_onnx: Path, tmp_path: Path) -> None:
    fields = {"prompt": "long", "seconds": 13.0, "steps": 1, "seed": 2}
    with service.client.stream("POST", "/v1/audio/generate?stream=1", json=fields) as answer:
        assert answer.status_code == 200
        pieces = list(answer.iter_raw())
        assert int(answer.headers["content-length"]) == sum(map(len, pieces))
    whole = by_command(tiny_onnx, tmp_path / "a.wav", {**fields, "chunk-frames": 128})
    assert b"".join(pieces) == whole and len(pieces) > 2
    assert service.client.post("/v1/audio/generate?stream=1", json={**fields, "format": "mp3"}).status_code == 422


def refused(answer: Any, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    assert_user_error(CommandResult(2, "", answer.text), *words)


def test_wrong_input_is_two_lines(service: Service, sound: Path) -> None:
    url, file = "/v1/audio/generate", {"init_audio": ("a.wav", sound.read_bytes())}
    refused(service.generate(prompt="a", seconds=1e9), 422, "seconds")
    refused(service.generate(prompt="a", steps=101), 422, "steps 101 is more than this server's 100")
    refused(service.generate(prompt="a", apg=0.5), 422, "apg does nothing at cfg 1")
    refused(service.generate(prompt=5), 422, "prompt")
    refused(service.generate(prompt="a", init_audio="/etc/passwd"), 422, "init_audio")
    refused(service.client.post(url, content=b"{", headers={"content-type": "application/json"}), 422)
    refused(service.client.post(url, content=b"prompt=a"), 415)
    refused(
        service.client.post(url, data={"prompt": "a"}, files=file),
        422,
        "--init-audio needs --init-noise-level or --inpaint-range",
    )
    late = {"prompt": "a", "init_start": "9", "init_noise_level": "0.5"}
    refused(service.client.post(url, data=late, files=file), 422, "init_audio ends at 1.00 s")
    noise = {"init_audio": ("a.wav", b"no sound at all")}
    answer = service.client.post(url, data={"prompt": "a", "init_noise_level": "1"}, files=noise)
    refused(answer, 422, "cannot read init_audio")
    assert "/tmp" not in answer.text
    refused(service.client.get("/nothing"), 404)
    large = {"init_audio": ("a.wav", b"x" * 400_001)}
    refused(service.client.post(url, data={"prompt": "a"}, files=large), 413, "larger than 400000 bytes")
    assert service.generate(prompt="\0a", seconds=0.5, steps=1).status_code == 200


def test_a_body_is_cut_at_the_limit_whatever_its_head_says(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        head = "POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        client.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode())
        sent = 0
        with pytest.raises(OSError):  # reset, or a broken pipe
            while sent < 1 << 30:
                sent += client.send(b"10000\r\n" + bytes(65536) + b"\r\n")
    assert sent < 64 << 20


def test_a_slow_sender_is_cut_off(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        head = "POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_pages_of_other_sites_and_other_names_are_refused(service: Service) -> None:
    refused(service.client.get("/v1/models", headers={"host": "evil.example"}), 421)
    refused(service.client.post("/v1/audio/generate", headers={"origin": "https://evil.example"}), 403)
    same = {"origin": service.address}
    assert service.client.get("/v1/models", headers=same).status_code == 200


def test_the_places_of_clients_that_leave_are_free(service: Service) -> None:
    body = json.dumps({**LONG, "seconds": 8}).encode()
    head = f"POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    clients = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
    for client in clients:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    service.until_metric("sa3_ring_requests", 4)
    steps = service.metric("sa3_ring_steps")
    for client in clients:
        client.close()
    service.until_metric("sa3_ring_requests", 0)
    service.until_metric("sa3_queue_requests", 0)
    assert service.metric("sa3_ring_steps") - steps < 40  # of the 100 that each of them had asked for
    assert service.generate(prompt="a", seconds=0.5, steps=1).status_code == 200


def test_what_is_served_and_how_it_is_asked(service: Service) -> None:
    (model,) = service.client.get("/v1/models").json()["models"]
    assert (model["id"], model["precision"], model["sample_rate"]) == ("medium", "fp32", 44_100)
    assert model["engines"].keys() == {"text", "encode", "dit", "decoder"}
    schema = service.client.get("/openapi.json").json()["paths"]["/v1/audio/generate"]["post"]["requestBody"]
    fields = schema["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "seconds", "seed", "steps", "cfg", "apg", "negative_prompt", "format", "inpaint"} <= fields.keys()
    page = service.client.get("/docs").text
    assert "inpaint" in page and "//" not in page.replace("http://", "").replace("https://", "")


def test_a_token_is_asked_for_and_a_full_queue_is_said(tiny_onnx: Path, tmp_path: Path) -> None:
    slow = {**LONG, "seconds": 30}  # seconds of work: the queue is still full when the last request comes
    file = tmp_path / "token"
    file.write_text(f"{secrets.token_urlsafe(24)}\n")
    token = file.read_text().strip()
    more = ["--token-file", file, "--depth", 1, "--queue", 1, "--drain-seconds", 60]
    with serving(tiny_onnx, *more, token=token) as service:
        for header in ({}, {"authorization": f"Bearer {token}x"}, {"authorization": f"Basic {token}"}):
            answer = service.client.post(
                "/v1/audio/generate", json={"prompt": "a"}, headers={"authorization": "", **header}
            )
            refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
        assert service.client.get("/metrics", headers={"authorization": ""}).status_code == 401
        assert service.client.get("/healthz", headers={"authorization": ""}).status_code == 200
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(service.generate(**slow, negative_prompt=None).status_code))
            for _ in range(5)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.3)
        service.until_metric("sa3_ring_requests", 1)
        full = service.generate(**slow)
        refused(full, 429, "1 requests wait")
        assert int(full.headers["retry-after"]) >= 1
        assert service.stop() == 0  # those that were taken are finished
        for thread in threads:
            thread.join()
        assert answers.count(200) >= 2 and set(answers) <= {200, 429}
        assert all("endless" not in line for line in service.lines)


def test_mistakes_of_the_command_are_two_lines(tiny_onnx: Path, tmp_path: Path) -> None:
    from sa3_serve import command

    short = tmp_path / "token"
    short.write_text("short")
    argv = ["--onnx-root", tiny_onnx, "--backend", "onnxruntime", "--precision", "fp32", "--port", 0]
    assert_user_error(run(command.main, [*argv, "--token-file", short]), "holds no token")
    assert_user_error(run(command.main, [*argv, "--token-file", tmp_path / "none"]), "cannot read --token-file")
    assert_user_error(run(command.main, ["--onnx-root", tmp_path, "--backend", "onnxruntime"]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_line = [*argv[:-1], taken.getsockname()[1]]
        assert_user_error(run(command.main, taken_line), "cannot listen on 127.0.0.1")


def test_help_needs_no_package() -> None:
    result = subprocess.run(
        [sys.executable, "-S", "-m", "sa3_serve.command", "--help"], capture_output=True, text=True, check=False,
        cwd=Path(sa3_trt.__file__).parent,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage: sa3_serve")


def test_a_request_for_other_adapters_is_refused_with_those_that_run(service: Service) -> None:
    (model,) = service.client.get("/v1/models").json()["models"]
    assert model["loras"] == [] and len(model["loras_digest"]) == 12
    fields = {"prompt": "x", "seconds": 1.0, "steps": 1, "seed": 1}
    assert service.generate(**fields, loras_digest=model["loras_digest"]).status_code == 200
    refused = service.generate(**fields, loras_digest="0123456789ab")
    assert refused.status_code in (400, 422) and "adapters" in refused.text and "0123456789ab" in refused.text


def test_a_server_for_text_alone_needs_no_audio_encoder_and_refuses_sounds(
    tiny_onnx: Path, tmp_path: Path, sound: Path
) -> None:
    root = tmp_path / "onnx"
    shutil.copytree(tiny_onnx, root)
    for encoder in root.glob("same-l/enc_*"):
        encoder.unlink()
    with serving(root, "--text-only") as server:
        assert server.client.get("/v1/models").json()["models"][0]["init_audio"] is False
        assert (
            server.client.post("/v1/audio/generate", json={"prompt": "a", "seconds": 1, "steps": 1}).status_code == 200
        )
        files = {"init_audio": ("a.wav", sound.read_bytes())}
        answer = server.client.post("/v1/audio/generate", data={"prompt": "a", "seconds": "1"}, files=files)
        assert (
            answer.status_code == 422
            and "does not accept init_audio" in answer.text
            and len(answer.text.splitlines()) == 2
        )


def test_the_benchmark_compares_the_service_with_its_ring(tiny_onnx: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--precision", "fp32", "--backend", "onnxruntime", "--onnx-root", str(tiny_onnx), "--seconds", "0.5"]
    assert bench_serve.main([*argv, "--steps", "1", "--clients", "2", "--sounds", "4", "--repeats", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["share_of_ring"] == report["server_sounds_per_second"] / report["ring_sounds_per_second"] > 0
    assert report["overhead_ms"] == report["one_client_ms"] - report["generate_ms"]
    assert 0 < report["p50_seconds"] <= report["p99_seconds"]
