"""The table of targets: names, groups, refusals; no other file names an engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sa3_trt_core import paths, targets
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import CONTRACTS

ROOT = Path(__file__).resolve().parents[2]
USUAL = [
    "t5gemma", "same-s-encoder", "same-s-decoder", "same-l-encoder", "same-l-decoder",
    "sa3-sm-music", "sa3-sm-sfx", "sa3-m",
]  # fmt: skip
FP32 = ["sa3-m-fp32", "sa3-sm-music-fp32", "sa3-sm-sfx-fp32", "same-l-decoder-fp32", "same-s-decoder-fp32"]


def names(listed: list[targets.Target]) -> list[str]:
    return [target.name for target in listed]


def test_names_and_groups() -> None:
    assert sorted(names(list(targets.TARGETS))) == sorted([*USUAL, *FP32, "sa3-m-fp8"])
    assert sorted(names(targets.expand(["all"]))) == sorted(USUAL)
    assert sorted(names(targets.expand(["all-fp32"]))) == sorted(FP32)
    assert sorted(names(targets.expand(["all-both"]))) == sorted([*USUAL, *FP32])


def test_fp8_is_built_by_its_own_name_only() -> None:
    fp8 = targets.find_target("sa3-m-fp8")
    assert fp8.opt_in
    assert fp8.groups == ()
    assert names(targets.expand(["sa3-m-fp8"])) == ["sa3-m-fp8"]
    assert sorted(names(targets.missing_candidates())) == sorted([*USUAL, *FP32])


def test_expand_keeps_the_order_and_drops_repeats() -> None:
    expanded = names(targets.expand(["sa3-m", "all", "sa3-m", "sa3-m-fp8"]))
    assert expanded[0] == "sa3-m"
    assert expanded[-1] == "sa3-m-fp8"
    assert len(expanded) == len(set(expanded)) == 9


def test_every_target_is_complete_and_its_engine_is_its_own() -> None:
    engines = [target.engine for target in targets.TARGETS]
    assert len(set(engines)) == len(engines)
    for target in targets.TARGETS:
        assert target.kind in CONTRACTS
        assert target.produced_by
        for path in (*target.onnx, target.engine):
            assert re.fullmatch(r"[a-z0-9-]+/[a-z0-9_]+(\.onnx)?", path)


def test_published_and_older_names_are_both_known() -> None:
    assert targets.find_target("sa3-m").onnx == ("sa3-m/dit_fp16mixed.onnx", "sa3-m/dit_fp16.onnx")
    assert targets.find_target("sa3-m-fp8").onnx == ("sa3-m/dit_fp8.onnx",)
    assert "same-l/dec_dynamic_triton_swa.onnx" in targets.find_target("same-l-decoder").onnx


@pytest.mark.parametrize("lookup", [targets.find_target, lambda name: targets.expand([name])])
def test_an_unknown_name_lists_the_good_ones(lookup) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ToolError) as caught:
        lookup("sa3-m-fp9")
    assert "did you mean sa3-m-fp8?" in caught.value.message
    assert all(name in caught.value.hint for name in USUAL)


@pytest.mark.parametrize(
    ("dit", "precision", "engine", "decoder"),
    [
        ("medium", "fp16mixed", "sa3-m", "same-l-decoder"),
        ("medium", "fp8", "sa3-m-fp8", "same-l-decoder"),
        ("medium", "fp32", "sa3-m-fp32", "same-l-decoder-fp32"),
        ("sm-music", "fp16mixed", "sa3-sm-music", "same-s-decoder"),
        ("sm-sfx", "fp32", "sa3-sm-sfx-fp32", "same-s-decoder-fp32"),
    ],
)
def test_the_engines_of_a_choice(dit: str, precision: str, engine: str, decoder: str) -> None:
    assert targets.dit_target(dit, precision).name == engine
    assert targets.decoder_for(dit, precision).name == decoder


@pytest.mark.parametrize("dit", ["sm-music", "sm-sfx"])
def test_a_dit_without_fp8_is_refused_in_words(dit: str) -> None:
    with pytest.raises(ToolError) as caught:
        targets.dit_target(dit, "fp8")
    assert caught.value.message == f"the DiT {dit} has no fp8 engine (it has fp16mixed, fp32)"
    assert "`dit=medium`" in caught.value.hint


def test_what_is_published_is_known_by_its_place() -> None:
    """Every publishable target is recognised by its path under a root; in any other folder it is the first one."""
    publishable = [target for target in targets.TARGETS if target.publishable]
    assert [target.precision for target in publishable] == ["fp8"] * len(publishable) and publishable
    for target in publishable:
        assert targets.publishable_at(Path("/anywhere/root") / target.onnx[0]) is target
    assert targets.publishable_at(Path("elsewhere/dit_fp8.onnx")) is publishable[0]


def test_the_autoencoder_of_a_dit_is_in_its_row() -> None:
    for name, dit in targets.MODELS.items():
        assert targets.encoder_for(name).engine.startswith(f"{dit.autoencoder}/")
        assert targets.decoder_for(name, "fp32").engine.startswith(f"{dit.autoencoder}/")
        assert targets.dit_target(name, "fp16mixed").onnx[0].startswith(f"{dit.folder}/")
    assert targets.find_dit("medium").reach == 12 and targets.find_dit("sm-music").reach is None
    with pytest.raises(ToolError, match="unknown DiT 'larg'"):
        targets.find_dit("larg")


def test_engine_paths() -> None:
    fp8 = targets.find_target("sa3-m-fp8")
    assert BACKENDS["tensorrt"].engine_path(Path("models"), "sm_89", fp8) == Path("models/sm_89/sa3-m/dit_fp8.trt")
    assert BACKENDS["tensorrt_rtx"].engine_path(Path("models"), "sm_120", fp8) == Path(
        "models/sm_120/sa3-m/dit_fp8.rtx"
    )


def test_arches() -> None:
    assert paths.parse_arches("sm_89, sm_120,sm_89") == ["sm_89", "sm_120"]
    for bad in ("sm_88", "", ",", "sm_89,89", "SM_89"):
        with pytest.raises(ToolError) as caught:
            paths.parse_arches(bad)
        assert "sm_120" in caught.value.hint


def test_the_onnx_folder_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SA3_ONNX_DIR", raising=False)
    assert paths.onnx_root_from(None) is None
    assert paths.onnx_root_from(tmp_path) == tmp_path
    monkeypatch.setenv("SA3_ONNX_DIR", str(tmp_path / "absent"))
    with pytest.raises(ToolError, match="no such ONNX folder"):
        paths.onnx_root_from(None)


def test_no_other_file_names_an_engine() -> None:
    stems = {target.engine.rpartition("/")[2] for target in targets.TARGETS}
    pattern = re.compile(rf"\b({'|'.join(sorted(stems))})\.(trt|rtx)\b")
    sources = [file for folder in ("build", "scripts", "interface") for file in (ROOT / folder).rglob("*.py")]
    assert any(file.name == "targets.py" for file in sources)
    offenders = [str(file) for file in sources if file.name != "targets.py" and pattern.search(file.read_text("utf-8"))]
    assert offenders == []
