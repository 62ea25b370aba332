"""Bulk generation on Ray: two nodes in one process, a killed worker, existing sounds, shards without Ray."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

import sa3_trt
from helpers.commands import assert_user_error, listing, run
from sa3_bulk.worker import Worker
from sa3_trt_core.cli.job import make_job

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
# Before Ray is imported: it reads them once.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

ROWS = 10


class Nodes:
    """A Ray cluster of two nodes on the loopback address."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": "127.0.0.1"}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args=node)
        self.cluster.add_node(**node)
        self.address = str(self.cluster.address)

    def workers(self) -> Iterator[int]:
        """Yield the ids of the processes in which our actors run."""
        raylets = {
            process.process.pid for node in self.cluster.list_all_nodes() for process in node.all_processes["raylet"]
        }
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "cmdline").read_text()
            except OSError:
                continue
            if parent in raylets and words.startswith("ray::Worker"):
                yield int(folder.name)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.cluster.shutdown()


@pytest.fixture
def line(tiny_onnx: Path, tmp_path: Path) -> list[object]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"sound {number}\n" for number in range(ROWS)))
    options = ["--onnx-root", tiny_onnx, "--backend", "onnxruntime", "--precision", "fp32", "--seconds", 1]
    return [*options, "--steps", 2, "--seed", 3, "--depth", 2, "--prompts-file", prompts]


def test_a_cluster_makes_every_sound_once_though_a_worker_is_killed(
    nodes: Nodes, line: list[object], tmp_path: Path
) -> None:
    out, killed = tmp_path / "cluster", []

    def kill_one() -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not killed:
            if len(list(out.glob("[0-9]*.wav"))) >= 2 and (worker_ids := list(nodes.workers())):
                os.kill(worker_ids[0], signal.SIGKILL)
                killed.append(worker_ids[0])
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one)
    killer.start()
    result = run(sa3_trt.main, [*line, "--ray", nodes.address, "--out-dir", out])
    killer.join()
    assert result.code == 0, result.err
    assert killed and "a worker was lost" in result.err and f"generate: {ROWS}/{ROWS} sounds 100%" in result.err
    assert "left" in result.err or "a second" in result.err
    again = run(sa3_trt.main, [*line, "--ray", "127.0.0.1:1", "--out-dir", out])  # nothing is left to run on Ray
    assert again.code == 0 and f"{ROWS} of {ROWS} sounds are there already" in again.err, again.err
    for part in ("1/2", "2/2"):
        assert run(sa3_trt.main, [*line, "--shard", part, "--out-dir", tmp_path / "shards", "--quiet"]).code == 0
    assert listing(out) == listing(tmp_path / "shards") and len(listing(out)) == ROWS


def test_what_a_worker_refuses_and_rows_that_fail_are_two_lines(
    nodes: Nodes, line: list[object], tmp_path: Path
) -> None:
    more = ["--ray", nodes.address, "--out-dir", tmp_path / "out", "--quiet"]
    assert_user_error(run(sa3_trt.main, [*line, *more, "--peak", "limit"]), "--peak limit")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_not_shared_is_said_at_the_start(
    line: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = sa3_trt.parse_flags([str(word) for word in [*line, "--ray", "auto", "--out-dir", tmp_path]])
    worker = Worker(make_job(args), False, 2, (tmp_path / "probe", "token"), tmp_path)
    monkeypatch.chdir(tmp_path)
    message, hint = worker.start()
    assert f"{tmp_path} on {socket.gethostname()} is not the folder" in message and "share" in str(hint)


def test_a_sound_with_other_settings_is_made_again(line: list[object], tmp_path: Path) -> None:
    argv = [*line[:-2], "--prompt", "a", "--prompt", "b" * 2500, "--shard", "1/1", "--out-dir", tmp_path]
    assert run(sa3_trt.main, argv).code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.wav")}
    assert len(before) == 2
    first = min(before)
    leftover = first.with_name(f".{first.stem[:32]}.0123456789ab.tmp.wav")
    leftover.touch()  # of a run that was killed
    result = run(sa3_trt.main, argv)
    assert result.code == 0 and "2 were there already" in result.out and not leftover.exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    result = run(sa3_trt.main, [*argv, "--steps", 3])
    assert result.code == 0 and "already" not in result.out
    assert all(path.stat().st_mtime_ns > stamp for path, stamp in before.items())


def test_shards_are_every_nth_row_under_their_own_numbers(line: list[object], tmp_path: Path) -> None:
    result = run(sa3_trt.main, [*line, "--shard", "4/4", "--out-dir", tmp_path, "--quiet"])
    assert result.code == 0, result.err
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["004_sound-3_6.wav", "008_sound-7_10.wav"]
    for wrong in ("0/2", "3/2", "1", "a/b"):
        assert_user_error(run(sa3_trt.main, [*line, "--shard", wrong]))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--ray", "127.0.0.1:1"], "no Ray answers at 127.0.0.1:1"),
        (["--ray", "nonsense"], "is no HOST:PORT"),
        (["--ray", "--devices", "cpu"], "--devices and --ray cannot be combined"),
        (["--devices", "cpu", "--free-models"], "--devices and --free-models cannot be combined"),
    ],
)
def test_mistakes_are_two_lines(line: list[object], tmp_path: Path, more: list[str], words: str) -> None:
    assert_user_error(run(sa3_trt.main, [*line, *more, "--out-dir", tmp_path / "out"]), words)
    assert not list(tmp_path.glob("out/*.wav"))


def test_without_ray_the_command_says_what_to_install(
    line: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(sa3_trt.main, [*line, "--devices", "cpu", "--out-dir", tmp_path / "out"])
    assert_user_error(result, "--devices needs Ray")
    assert "pip install 'sa3-trt[ray]'" in result.err and "--shard" in result.err


def test_devices_are_a_ray_of_this_machine(line: list[object], tmp_path: Path) -> None:
    result = run(sa3_trt.main, [*line[:-2], "--prompt", "a", "--devices", "cpu", "--out", tmp_path / "a.wav", "--json"])
    assert result.code == 0, result.err
    assert soundfile.info(tmp_path / "a.wav").frames == 44_100
    assert '"generations_per_second"' in result.out
