"""Settings that stop the hub's client before a request, and caches on disks without links; each in a subprocess."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import graphs, hub_server
from helpers.hub_server import LocalHub
from sa3_trt_core.targets import HUB_REPOSITORY

GRAPH, SIDECAR = "onnx/sa3-m/dit_fp16.onnx", "onnx/sa3-m/dit_fp16.onnx.data"
WEIGHTS = bytes(range(256)) * 400
CODE = (
    "import sys; from sa3_trt_core.cli.arguments import run_command; from sa3_trt_core.hub import resolve\n"
    "from sa3_trt_core.paths import ModelSource; from sa3_trt_core.targets import find_target\n"
    "sys.exit(run_command(lambda: print(resolve.resolve_onnx(find_target('sa3-m'), ModelSource())) or 0))"
)


def request_dit(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Request the DiT from the hub in a subprocess; the client reads its variables when it starts."""
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_HOME": str(cache), "HF_ENDPOINT": "https://127.0.0.1:9", **environment}
    return subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=env, timeout=60
    )


@pytest.mark.parametrize(("environment", "words"), [
    ({"ALL_PROXY": "socks://user:secret@127.0.0.1:7890"}, ("ALL_PROXY=socks://127.0.0.1:7890", "socks5://")),
    ({"HTTPS_PROXY": "socks5://127.0.0.1:7890"}, ("HTTPS_PROXY=socks5://127.0.0.1:7890",)),
    ({"https_proxy": "ftp://127.0.0.1:7890"}, ("https_proxy=ftp://127.0.0.1:7890",)),
    ({"HF_TOKEN": "hf_\u00fc"}, ("token", "HF_TOKEN")),
    ({"SSL_CERT_FILE": "/nonexistent/ca.pem"}, ("SSL_CERT_FILE=/nonexistent/ca.pem",)),
    ({"SSL_CERT_FILE": __file__}, ("certificate", "SSL_CERT_FILE")),
    ({"HF_HUB_ETAG_TIMEOUT": "soon"}, ("HF_",)),
    ({"HF_ENDPOINT": "127.0.0.1:9"}, ("hub",)),
    ({"HTTPS_PROXY": "http://u:secret@127.0.0.1:9"}, ("cannot be reached", "through HTTPS_PROXY=http://127.0.0.1:9")),
    ({}, ("cannot be reached (https://127.0.0.1:9: ",)),
])  # fmt: skip
def test_what_is_wrong_is_named_with_its_cure(
    tmp_path: Path, environment: dict[str, str], words: tuple[str, ...]
) -> None:
    result = request_dit(tmp_path, **environment)
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout, len(lines)) == (2, "", 2), result
    assert lines[0].startswith("error: ") and lines[1].startswith("  hint: ")
    assert all(word in result.stderr for word in words) and "secret" not in result.stderr, result.stderr


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with hub_server.serve() as server:
        server.commit(HUB_REPOSITORY, {GRAPH: graphs.with_sidecar("dit_fp16.onnx.data"), SIDECAR: WEIGHTS})
        yield server


def test_a_cache_without_links_works_and_holds_each_file_once(tmp_path: Path, hub: LocalHub) -> None:
    settings = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_SYMLINKS": "1", "HF_HUB_DISABLE_XET": "1"}
    for _ in range(2):
        result = request_dit(tmp_path, **settings)
        assert result.returncode == 0, result.stderr
        hub.refuse = {"*": hub_server.InjectedResponse(500)}  # the second time nothing is requested
        settings["HF_HUB_OFFLINE"] = "1"
    graph = Path(result.stdout.strip())
    assert graph.with_name("dit_fp16.onnx.data").read_bytes() == WEIGHTS
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == len(WEIGHTS)]
    assert len(copies) == 1 and not any(path.is_symlink() for path in tmp_path.rglob("*"))
