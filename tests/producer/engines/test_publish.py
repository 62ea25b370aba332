"""Publishing the FP8 DiT to a local hub: refused unless complete and verified, read back, the token not printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import publish
import pytest

from helpers import graphs, hub_server
from helpers.commands import assert_user_error, listing, run
from helpers.hub_server import InjectedResponse, LocalHub
from sa3_build.engines import publish as engines_publish
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import HUB_REPOSITORY, find_target

TOKEN = "hf_a_token_that_nobody_may_see"
NAMES = {
    "onnx/sa3-m/dit_fp8.onnx", "onnx/sa3-m/dit_fp8.onnx.data", "onnx/sa3-m/dit_fp8.onnx.report.json",
    "onnx/sa3-m/dit_fp8.calibration.json", "onnx/sa3-m/dit_fp8.onnx.check.npz",
}  # fmt: skip
GATES = {"proof": "holds", "worst_denoised_cosine": 0.995}
SETTINGS = {"min_cosine": 0.99, "headroom": 2.0}


def finished(folder: Path, name: str = "dit_fp8.onnx", sidecar: str = "dit_fp8.onnx.data", **changed: object) -> Path:
    """Write a finished FP8 DiT with the names, records and gates of build_dit_fp8.py."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx = folder / name
    onnx.write_bytes(graphs.with_sidecar(sidecar))
    (folder / sidecar).write_bytes(b"12345678")
    made = [onnx, folder / sidecar]
    digests = {file.name: manifest.sha256_of(file) for file in made}
    report = folder / f"{name}.report.json"
    report.write_text(json.dumps({"calibration": {"rows": 896}, "outputs": changed.get("outputs", digests)}))
    gates, settings = {**GATES, **changed.get("gates", {})}, {**SETTINGS, **changed.get("settings", {})}  # type: ignore[dict-item]
    kind = str(changed.get("kind", "dit_fp8"))
    rows = folder / f"{name}.check.npz"
    rows.write_bytes(b"answers")
    made += [rows] if changed.get("rows", True) else []
    manifest.write_manifest(onnx, kind, [*made, report], {"sa3-m.calib.npz": "a" * 64}, settings, gates)
    return onnx


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalHub]:
    with hub_server.serve(LocalHub(token=TOKEN)) as server:
        server.commit(HUB_REPOSITORY, {"README.md": b"hello"})
        with hub_server.client_at(server.address, tmp_path / "cache", token=TOKEN):
            yield server


def sent(onnx: Path, *words: str, code: int = 0) -> tuple[dict, str]:
    result = run(publish.main, ["--onnx", onnx, "--send", "--json", *words])
    assert result.code == code, result.err
    assert TOKEN not in result.out + result.err
    return (json.loads(result.out) if code == 0 else {}), result.err


def test_without_send_nothing_leaves_the_machine(local: LocalHub, tmp_path: Path) -> None:
    onnx = finished(tmp_path / "sa3-m")
    before = listing(tmp_path)
    result = run(publish.main, ["--onnx", onnx])
    assert result.code == 0 and "nothing uploaded" in result.out
    assert all(name in result.out for name in NAMES)
    assert local.asked == [] and listing(tmp_path) == before


def test_a_pull_request_has_exactly_the_published_names(local: LocalHub, tmp_path: Path) -> None:
    onnx = finished(tmp_path / "sa3-m")
    document, _ = sent(onnx)
    branches = local.branches[HUB_REPOSITORY]
    tree = local.commits[branches["refs/pr/1"]]
    assert tree.keys() == {"README.md", *NAMES} and local.commits[branches["main"]].keys() == {"README.md"}
    assert document["sent"]["address"].endswith("/discussions/1") and document["sent"]["read_back"] == 5
    for name in ("dit_fp8.onnx", "dit_fp8.onnx.data", "dit_fp8.onnx.report.json", "dit_fp8.onnx.check.npz"):
        assert tree[f"onnx/sa3-m/{name}"] == (onnx.parent / name).read_bytes()
    summary = json.loads(tree["onnx/sa3-m/dit_fp8.calibration.json"])
    assert summary["calibration"] == {"rows": 896} and summary["calibration_sets"] == {"sa3-m.calib.npz": "a" * 64}
    requests = [(method, path) for method, path, _ in local.asked]
    assert requests.index(
        ("HEAD", f"{HUB_REPOSITORY}/resolve/{branches['refs/pr/1']}/onnx/sa3-m/dit_fp8.onnx.data")
    ) > (requests.index(("POST", f"api/models/{HUB_REPOSITORY}/commit/main")))


def test_a_manifest_with_the_earlier_name_of_the_gate_is_read(tmp_path: Path) -> None:
    onnx = finished(tmp_path)
    path = manifest.manifest_path(onnx)
    for worst, code in (("0.995", 0), ("0.98", 3)):
        path.write_text(path.read_text().replace('"worst_denoised_cosine": 0.995', f'"worst denoised cosine": {worst}'))
        assert run(publish.main, ["--onnx", onnx]).code == code
        path.write_text(path.read_text().replace(f'"worst denoised cosine": {worst}', '"worst_denoised_cosine": 0.995'))


def test_what_was_published_is_what_a_consumer_finds(local: LocalHub, tmp_path: Path) -> None:
    sent(finished(tmp_path / "sa3-m"), "--branch", "main")
    path = resolve.resolve_onnx(find_target("sa3-m-fp8"), ModelSource())
    assert (path.parent / "dit_fp8.onnx.data").read_bytes() == b"12345678"
    assert (path.parent / "dit_fp8.onnx.check.npz").read_bytes() == b"answers"


def test_another_repository_and_a_new_branch(local: LocalHub, tmp_path: Path) -> None:
    local.commit("someone/else", {"README.md": b""})
    onnx = finished(tmp_path / "sa3-m")
    for _ in range(2):  # the second time the branch is there and nothing has changed
        sent(onnx, "--target-repo", "someone/else", "--branch", "fp8")
    assert local.commits[local.branches["someone/else"]["fp8"]].keys() == {"README.md", *NAMES}
    assert local.branches[HUB_REPOSITORY].keys() == {"main"}


def test_what_comes_back_otherwise_is_exit_3(local: LocalHub, tmp_path: Path) -> None:
    local.spoil.add("upload")
    _, errors = sent(finished(tmp_path / "sa3-m"), code=3)
    assert "(digest " in errors and "send again" in errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "dit_fp8_new.onnx"}, "the name must be dit_fp8.onnx"),
        ({"sidecar": "dit_fp8lin.onnx.data"}, "keeps its weights in dit_fp8lin.onnx.data"),
        ({"kind": "dit_fp16mixed"}, "is a dit_fp16mixed"),
        ({"outputs": {"dit_fp8.onnx": "b" * 64}}, "belongs to another dit_fp8.onnx"),
        ({"outputs": None}, "is not the report"),
        ({"rows": False}, "has no check rows"),
    ],
)
def test_what_is_not_a_finished_dit_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    onnx = finished(tmp_path, **change)
    assert_user_error(run(publish.main, ["--onnx", onnx]), words)


@pytest.mark.parametrize(
    "change",
    [
        {"gates": {"proof": "fails"}},
        {"gates": {"worst_denoised_cosine": 0.98}},
        {"gates": {"worst_denoised_cosine": None}},
        {"settings": {"recipe": "reference"}},
    ],
)
def test_gates_that_do_not_hold_are_exit_3(tmp_path: Path, change: dict) -> None:
    assert run(publish.main, ["--onnx", finished(tmp_path, **change)]).code == 3


@pytest.mark.parametrize(
    "file", ["dit_fp8.onnx", "dit_fp8.onnx.data", "dit_fp8.onnx.report.json", "dit_fp8.onnx.check.npz"]
)
def test_a_changed_byte_is_found(tmp_path: Path, file: str) -> None:
    onnx = finished(tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert_user_error(run(publish.main, ["--onnx", onnx]), "is not a finished artefact")
    (tmp_path / file).unlink()
    assert run(publish.main, ["--onnx", onnx]).code == 2


@pytest.mark.parametrize(
    "answer",
    [
        InjectedResponse(403),
        InjectedResponse(403, "GatedRepo"),
        InjectedResponse(404, "RepoNotFound"),
        InjectedResponse(418),
    ],
)
def test_a_hub_that_refuses_is_two_lines(local: LocalHub, tmp_path: Path, answer: InjectedResponse) -> None:
    local.refuse["POST"] = answer
    _, errors = sent(finished(tmp_path / "sa3-m"), code=2)
    assert len(errors.splitlines()) == 2 and ("write permission" in errors or "418" in errors)


def test_without_a_token_or_with_a_wrong_one(local: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = finished(tmp_path / "sa3-m")
    for token in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        errors = sent(onnx, code=2)[1]
        assert "hf auth login" in errors and "hf_wrong" not in errors
    assert local.commits.keys() == {local.branches[HUB_REPOSITORY]["main"]}


def test_a_real_one_passes(tiny_fp8: Path) -> None:
    parcel = engines_publish.check(tiny_fp8 / find_target("sa3-m-fp8").onnx[0])
    assert {item.path for item in parcel.files} == NAMES
