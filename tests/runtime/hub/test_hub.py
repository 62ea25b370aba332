"""Finding files on a hub: the real client against a local hub with injected failures."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from helpers import graphs, hub_server
from helpers.hub_server import GATED, NO_REPOSITORY, InjectedResponse, LocalHub
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import download, resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import CHECKPOINT_REPOSITORY, HUB_REPOSITORY, find_target

FP8, HALF = find_target("sa3-m-fp8"), find_target("sa3-m")
GRAPH, SIDECAR = "onnx/sa3-m/dit_fp8.onnx", "onnx/sa3-m/dit_fp8lin.onnx.data"
WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalHub]:
    """Run a hub that has the FP8 DiT with a sidecar of another name, and a client with an empty cache."""
    with hub_server.serve() as server:
        server.commit(HUB_REPOSITORY, {GRAPH: graphs.with_sidecar("dit_fp8lin.onnx.data"), SIDECAR: WEIGHTS})
        with hub_server.client_at(server.address, tmp_path / "cache", token="hf_secret"):
            yield server


def refused(words: str, hint: str, **source) -> ToolError:  # type: ignore[no-untyped-def]
    with pytest.raises(ToolError, match=words) as caught:
        resolve.resolve_onnx(FP8, ModelSource(**source))
    assert hint in caught.value.lines()
    assert len(caught.value.lines().splitlines()) == 2
    return caught.value


def test_graph_and_sidecar_arrive_and_are_kept(local: LocalHub) -> None:
    path = resolve.resolve_onnx(FP8, ModelSource())
    assert path.name == "dit_fp8.onnx"
    assert (path.parent / "dit_fp8lin.onnx.data").read_bytes() == WEIGHTS
    assert download.expected_sha256(path.parent / "dit_fp8lin.onnx.data") == hashlib.sha256(WEIGHTS).hexdigest()
    requests_before = len(local.asked)
    assert (
        resolve.resolve_onnx(FP8, ModelSource()) == path
        and resolve.resolve_onnx(FP8, ModelSource(offline=True)) == path
    )
    assert len(local.asked) == requests_before, "what is in the cache is not asked for again"


def test_the_token_goes_to_the_hub_and_not_to_its_storage(local: LocalHub) -> None:
    resolve.resolve_onnx(FP8, ModelSource())
    token_by_host = {path.startswith("cdn/"): headers.get("authorization") for _, path, headers in local.asked}
    assert token_by_host == {False: "Bearer hf_secret", True: None}


def test_a_given_folder_is_the_only_place(local: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(ToolError) as caught:
        resolve.resolve_onnx(FP8, ModelSource(tmp_path))
    assert "build/build_dit_fp8.py" in caught.value.hint
    with pytest.raises(ToolError, match=r"tokenizer\.json"):
        resolve.resolve_tokenizer(ModelSource(tmp_path))
    assert local.asked == []


def test_every_name_that_the_hub_has_used_is_found(local: LocalHub) -> None:
    local.commit(HUB_REPOSITORY, {"onnx/sa3-m/dit_fp16.onnx": graphs.with_sidecar("odd name.data")})
    with pytest.raises(ToolError, match=r"odd name\.data of sa3-m is not published"):
        resolve.resolve_onnx(HALF, ModelSource())
    commit = local.commit(HUB_REPOSITORY, {"onnx/sa3-m/odd name.data": b"8 bytes."})
    path = resolve.resolve_onnx(HALF, ModelSource(revision=commit))
    assert path.name == "dit_fp16.onnx" and (path.parent / "odd name.data").read_bytes() == b"8 bytes."


def test_a_branch_moves_only_when_it_is_asked_to(local: LocalHub) -> None:
    first = resolve.resolve_onnx(FP8, ModelSource())
    old = download.commit_of(first)
    local.commit(HUB_REPOSITORY, {GRAPH: graphs.with_sidecar("dit_fp8lin.onnx.data", "newer"), SIDECAR: WEIGHTS[::-1]})
    assert resolve.resolve_onnx(FP8, ModelSource()) == first
    newer = resolve.resolve_onnx(FP8, ModelSource(revision="main"))
    assert download.commit_of(newer) not in (None, old)
    assert (newer.parent / "dit_fp8lin.onnx.data").read_bytes() == WEIGHTS[::-1]
    assert resolve.resolve_onnx(FP8, ModelSource(revision=old)) == first


def test_a_sidecar_is_of_its_graphs_commit(local: LocalHub) -> None:
    """The branch moves after the graph has arrived and before its sidecar is requested."""
    local.refuse[SIDECAR] = InjectedResponse(503)
    refused("answered 503", "later")
    local.refuse.clear()
    local.commit(HUB_REPOSITORY, {GRAPH: graphs.with_sidecar("dit_fp8lin.onnx.data", "newer"), SIDECAR: b"other"})
    path = resolve.resolve_onnx(FP8, ModelSource())
    assert (path.parent / "dit_fp8lin.onnx.data").read_bytes() == WEIGHTS


def test_what_is_not_published_says_how_to_make_it(local: LocalHub) -> None:
    local.commits = {oid: {} for oid in local.commits}
    refused(f"not published yet in {HUB_REPOSITORY}", "python build/build_dit_fp8.py")
    refused("has no revision v9", "--revision", revision="v9")


@pytest.mark.parametrize(
    ("answer", "words", "hint"),
    [
        (InjectedResponse(401, NO_REPOSITORY), "no access to", "hf auth login"),
        (InjectedResponse(403, GATED), "no access to", "accept its licence at https://huggingface.co/"),
        (InjectedResponse(403), "no access to", "hf auth login"),
        (InjectedResponse(404, NO_REPOSITORY), "no access to", "hf auth login"),
        (InjectedResponse(429, headers={"Retry-After": "33"}), "429", "wait 33 seconds"),
        (InjectedResponse(503), "answered 503", "later"),
        (InjectedResponse(418), "answered 418", "HF_ENDPOINT"),
    ],
)
def test_the_hubs_refusals_are_two_lines(local: LocalHub, answer: InjectedResponse, words: str, hint: str) -> None:
    local.refuse["*"] = answer
    error = refused(words, hint)
    assert "hf_secret" not in error.lines()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.onnx"))


def test_a_cut_connection_is_taken_up_where_it_broke(local: LocalHub) -> None:
    local.cut["onnx/sa3-m/dit_fp8lin.onnx.data"] = [300_000]
    with pytest.raises(ToolError, match=r"connection broke .* 300\.0 kB of 1\.0 MB are kept") as caught:
        resolve.resolve_onnx(FP8, ModelSource())
    assert "again to resume" in caught.value.hint
    path = resolve.resolve_onnx(FP8, ModelSource())
    assert (path.parent / "dit_fp8lin.onnx.data").read_bytes() == WEIGHTS
    assert [headers["range"] for _, name, headers in local.asked if "range" in headers] == ["bytes=300000-"]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_wrong_bytes_never_reach_the_cache(local: LocalHub) -> None:
    local.spoil.add(SIDECAR)
    refused("arrived with digest", "discarded")
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("*.data*") if path.is_file()]
    local.spoil.clear()
    assert (resolve.resolve_onnx(FP8, ModelSource()).parent / "dit_fp8lin.onnx.data").read_bytes() == WEIGHTS


def test_small_files_are_checked_by_gits_digest(local: LocalHub) -> None:
    names = ["t5gemma-b-b-ul2/tokenizer.json", "t5gemma-b-b-ul2/tokenizer_config.json"]
    local.commit(CHECKPOINT_REPOSITORY, {names[0]: b"{}\n", names[1]: b"{ }\n"})
    local.spoil.add(names[1])
    with pytest.raises(ToolError, match=r"tokenizer_config\.json arrived with digest"):
        resolve.resolve_tokenizer(ModelSource())
    local.spoil.clear()
    assert resolve.resolve_tokenizer(ModelSource()).read_bytes() == b"{}\n"


def test_an_endpoint_that_is_no_hub_is_refused(local: LocalHub) -> None:
    local.refuse[GRAPH] = InjectedResponse(200)
    refused("no size and digest", "HF_ENDPOINT")


def test_a_slow_hub_is_waited_for_and_a_silent_one_is_not(local: LocalHub) -> None:
    local.pause = 0.1
    resolve.resolve_onnx(FP8, ModelSource())
    local.pause = 3.0
    refused("cannot be reached", "connect to the network", revision="main")


def test_no_server_at_all(tmp_path: Path) -> None:
    with hub_server.client_at("http://127.0.0.1:9", tmp_path):
        refused("cannot be reached", "--onnx-root")


def test_offline_asks_the_cache_alone(local: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("switched off .`offline`.", "--onnx-root", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("switched off .HF_HUB_OFFLINE.", "--onnx-root")
    assert local.asked == []


def test_a_full_disk_is_told_before_anything_is_read(local: LocalHub) -> None:
    huge = local.commit(HUB_REPOSITORY, {GRAPH: b""})
    local.refuse[GRAPH] = InjectedResponse(200, headers={
        "X-Repo-Commit": huge, "ETag": f'"{"a" * 64}"', "X-Linked-Size": str(1 << 60)})  # fmt: skip
    refused("free, .* needs", "HF_HOME")


def test_two_processes_at_once_read_the_bytes_once(local: LocalHub) -> None:
    graph_paths: list[Path] = []
    local.pause = 0.05
    threads = [
        threading.Thread(target=lambda: graph_paths.append(resolve.resolve_onnx(FP8, ModelSource()))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(graph_paths) == 2 and graph_paths[0] == graph_paths[1]
    assert len([path for path in local.reads() if path.startswith("cdn/")]) == 2  # graph and sidecar, each once


def test_the_environment_is_honoured(local: LocalHub, tmp_path: Path) -> None:
    """Run in a subprocess with the variables that a user sets."""
    code = (
        "from sa3_trt_core import targets, errors\n"
        "from sa3_trt_core.hub import resolve\n"
        "from sa3_trt_core.paths import ModelSource\n"
        "try: print(resolve.resolve_onnx(targets.find_target('sa3-m-fp8'), ModelSource()))\n"
        "except errors.ToolError as error: print(error.lines())\n"
    )
    env = {**os.environ, "HF_ENDPOINT": local.address, "HF_HOME": str(tmp_path / "home")}
    for off, words in (("1", "HF_HUB_OFFLINE"), ("0", str(tmp_path / "home"))):
        argv = [sys.executable, "-c", code]
        result = subprocess.run(argv, env={**env, "HF_HUB_OFFLINE": off}, capture_output=True, text=True, check=True)
        assert words in result.stdout.splitlines()[0]
