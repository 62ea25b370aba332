"""Malformed requests of every kind: fields, bodies, encodings, uploads and headers."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings, strategies as st

from helpers.service import Service

ANSWER_SECONDS = 20.0
BOUNDARY = "sa3boundary"

numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.none(),
    st.sampled_from([1e308, -0.0]),
)
texts = st.one_of(st.text(max_size=40), st.sampled_from(["\0", "\0a", "é" * 30, "a" * 5000, "💥", "\u202e"]), numbers)
names = st.sampled_from(
    ["prompt", "seconds", "seed", "steps", "cfg", "apg", "negative_prompt", "format", "init_start", "init_noise_level",
     "inpaint", "init_audio", "unknown", ""]
)  # fmt: skip
# A body that is valid by chance makes a sound: short ones, so that a thousand of them take minutes and not hours.
objects = st.dictionaries(names, texts, max_size=6).map(lambda body: {**body, "seconds": body.get("seconds", 0.1)})
sounds = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=60).map(lambda tail: b"RIFF\xff\xff\xff\xffWAVEfmt \x10\x00\x00\x00\x01\x00\x02\x00" + tail),
    st.binary(max_size=60).map(lambda tail: b"fLaC\x00\x00\x00\x22" + tail),
    st.binary(max_size=60).map(lambda tail: b"OggS\x00\x02" + tail),
)


def as_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def as_form(fields: dict[str, Any], sound: bytes, closed: bool) -> bytes:
    """Return a multipart form of the fields and a file, without its end unless `closed`."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode(
            "utf-8", "surrogatepass"
        )
        for name, value in fields.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="init_audio"; filename="a.wav"\r\n\r\n'.encode()
    return b"".join([*parts, head, sound, f"\r\n--{BOUNDARY}--\r\n".encode() if closed else b""])


json_kind, form_kind = "application/json", f"multipart/form-data; boundary={BOUNDARY}"
bodies: st.SearchStrategy[tuple[str, bytes]] = st.one_of(
    objects.map(lambda body: (json_kind, as_json(body))),
    st.tuples(objects, st.integers(0, 40)).map(lambda pair: (json_kind, as_json(pair[0])[: -pair[1] or None])),
    objects.map(lambda body: (json_kind, json.dumps(body, ensure_ascii=False).encode("utf-16", "surrogatepass"))),
    st.tuples(objects, sounds, st.booleans()).map(lambda three: (form_kind, as_form(*three))),
    st.binary(max_size=100).map(lambda data: (form_kind, data)),
    st.tuples(st.text("abc/;= \t", max_size=20), st.binary(max_size=50)),
)


def plain(kind: str, body: bytes) -> bytes:
    head = f"POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def send(service: Service, data: bytes) -> int:
    """Send raw bytes; return the status of the response, 0 for a connection closed without one."""
    with socket.create_connection(("127.0.0.1", service.port), ANSWER_SECONDS) as client:
        with contextlib.suppress(OSError):  # the server may have closed the connection already
            client.sendall(data)
        answer = b""
        try:
            while b"\r\n" not in answer:
                part = client.recv(4096)
                if not part:
                    break
                answer += part
        except ConnectionError:
            pass
        return int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0


def large(service: Service) -> int:
    """Upload 1 GB without a Content-Length; return the status, 0 for a closed connection."""
    with socket.create_connection(("127.0.0.1", service.port), ANSWER_SECONDS) as client:
        head = f"POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: {form_kind}\r\n"
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        start = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="init_audio"; filename="a"\r\n\r\n'.encode()
        sent = 0
        try:
            client.sendall(f"{len(start):x}\r\n".encode() + start + b"\r\n")
            while sent < 1 << 30:
                client.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
        except OSError:
            return 0 if sent < 1 << 28 else 599
    return 599


def send_malformed(service: Service, count: int) -> dict[str, Any]:
    """Send `count` requests, most of them malformed; return counts of the responses."""
    statuses: Counter[int] = Counter()
    odd: list[Callable[[], int]] = [
        lambda: large(service),
        lambda: send(service, plain(json_kind, b"{" * 50)[:-1]),  # and no more: too slow
        lambda: send(service, plain(json_kind, b"x" * 300_000)),
        lambda: send(service, b"GET / HTTP/9.9\r\n\r\n"),
        lambda: send(service, b"\x16\x03\x01\x02\x00" + bytes(64)),
        lambda: send(service, b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        lambda: send(service, b"POST /v1/audio/generate HTTP/1.1\r\nHost: evil\r\nContent-Length: 0\r\n\r\n"),
        lambda: send(service, b"POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"),
    ]

    @seed(18)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def send_example(body: tuple[str, bytes]) -> None:
        kind, data = body
        statuses[send(service, plain(kind.replace("\n", " "), data))] += 1

    send_example()
    for attempt in odd:
        statuses[attempt()] += 1
    return {
        "sent": sum(statuses.values()),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "server_errors": sum(number for status, number in statuses.items() if status >= 500),
    }
