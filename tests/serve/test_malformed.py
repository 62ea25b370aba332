"""Malformed requests; tests/fault/serve_load.py sends a thousand."""

from __future__ import annotations

from pathlib import Path

from fault.malformed import send_malformed

from helpers.service import serving

EXAMPLES = 60


def test_nothing_that_is_sent_is_our_fault_and_the_next_request_is_answered(tiny_onnx: Path) -> None:
    with serving(
        tiny_onnx, "--body-seconds", 1, "--max-body", 1 << 20, "--max-seconds", 0.5, "--max-steps", 2
    ) as service:
        counts = send_malformed(service, EXAMPLES)
        assert counts["server_errors"] == 0 and counts["sent"] >= EXAMPLES, counts
        assert counts["statuses"].get("422", 0) > EXAMPLES / 4 and {"408", "413", "421"} <= counts["statuses"].keys()
        assert service.generate(prompt="a", seconds=0.4, steps=1).status_code == 200
        assert service.stop() == 0
