"""Scoring a demonstration model: counts, the document, and its reproducibility."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import score_demo_model
import soundfile

from helpers.commands import assert_user_error, listing, run
from reprompt import deployed_text
from sa3_demo import score
from sa3_demo.music import FIRST_HELD_OUT, draw_piece
from sa3_trt_core.artifacts import files

SMALL = ["--prompts", 2, "--seconds", 2, "--steps", 2, "--loops", 3, "--batch", 2, "--seed", 5]
Document = dict[str, Any]


def scored(checkpoint: Path, *more: object) -> Document:
    result = run(score_demo_model.main, ["--checkpoint", checkpoint, *SMALL, "--json", *more])
    assert result.code == 0, result.err
    document: Document = json.loads(result.out)
    return document


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("score") / "clips"


@pytest.fixture(scope="module")
def document(tiny_checkpoint: Path, tiny_onnx: Path, out: Path) -> Document:
    return scored(tiny_checkpoint, "--onnx-root", tiny_onnx, "--out", out)


def fits(clip: Document, caption: Document) -> list[bool]:
    """Return two truth values: the clip's tempo fits the caption within 4 %, the clip's key fits."""
    bpm = clip["bpm"]
    return [bpm is not None and abs(bpm - caption["bpm"]) <= 0.04 * caption["bpm"], clip["key"] == caption["key"]]


def test_every_prompt_is_there_with_what_was_heard(document: Document) -> None:
    rows = document["prompts"]
    pieces = [draw_piece(FIRST_HELD_OUT + index, 2) for index in range(2)]
    assert [row["caption"] for row in rows] == [deployed_text(piece.example()) for piece in pieces]
    assert [(row["seed"], row["piece_seed"]) for row in rows] == [(5, pieces[0].seed), (6, pieces[1].seed)]
    assert [(row["bpm"], row["key"]) for row in rows] == [(piece.bpm, piece.key) for piece in pieces]


@pytest.mark.parametrize("source", ["generated", "data", "data_through_autoencoder"])
def test_the_rates_are_those_of_the_rows(document: Document, source: str) -> None:
    rows, rate = document["prompts"], document["rates"][source]
    hits = np.sum([fits(row[source], row) for row in rows], axis=0)
    assert [rate["of"], rate["tempo"]["hits"], rate["key"]["hits"]] == [2, *hits]
    assert [rate["tempo"]["rate"], rate["key"]["rate"]] == list(hits / 2)


def test_chance_is_every_clip_against_the_other_captions(document: Document) -> None:
    first, second = document["prompts"]
    hits = np.sum([fits(first["generated"], second), fits(second["generated"], first)], axis=0)
    chance = document["rates"]["chance"]
    assert [chance["of"], chance["tempo"]["hits"], chance["key"]["hits"]] == [2, *hits]


def test_the_other_parts_of_the_document(document: Document) -> None:
    assert document["settings"] == {
        "prompts": 2, "seconds": 2, "loops": 3, "steps": 2, "batch": 2, "seed": 5, "form": "deployed"
    }  # fmt: skip
    coded = document["autoencoder"]
    assert len(coded["loops"]) == 3
    stereo = [row["stereo"] for row in coded["loops"]]
    si_sdr = coded["si_sdr_db"]["stereo"]
    assert (si_sdr["least"], si_sdr["greatest"]) == (min(stereo), max(stereo))
    assert si_sdr["mean"] == pytest.approx(sum(stereo) / 3, rel=1e-4)
    # Random weights keep nothing of a waveform; a mono copy of the loop keeps most of it.
    assert si_sdr["greatest"] < 0 < coded["si_sdr_db"]["mono_copy"]["least"]
    assert coded["latent"]["std"] > 0
    painted = document["inpainting"]
    assert (painted["span_frames"], painted["frames"], len(painted["loops"])) == ([8, 15], 22, 3)
    conditioned, unconditioned = (painted[name]["latent_relative_l2"] for name in ("conditioned", "unconditioned"))
    assert conditioned["mean"] != unconditioned["mean"]  # only one of the two conditions the DiT on the loop
    assert document["repeated"] == {"clips": 2, "identical_samples": True}
    assert {"torch", "numpy", "diffusers"} <= document["tools"].keys()


def test_rollouts_of_the_two_graphs_agree(document: Document) -> None:
    rolled = document["rollouts"]
    assert [row["seed"] for row in rolled["prompts"]] == [5, 6]
    assert rolled["worst"] == {name: min(row[name] for row in rolled["prompts"]) for name in ("half", "export")}
    assert 0.999 <= rolled["worst"]["half"] < 1.0
    assert rolled["worst"]["export"] >= 0.999999
    assert rolled["met"] is True


def test_another_graph_generates_other_clips_and_its_rollouts_do_not_agree(
    document: Document, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    root = tmp_path / "onnx"
    shutil.copytree(tiny_onnx / "sa3-m", root / "sa3-m")
    half = root / "sa3-m" / "dit_fp16mixed.onnx"
    graph = onnx.load(root / "sa3-m" / "dit.onnx")
    weights = {weight.name: weight for weight in graph.graph.initializer}
    last = next(node for node in reversed(graph.graph.node) if node.op_type == "MatMul" and node.input[1] in weights)
    weight = weights[last.input[1]]
    weight.CopyFrom(numpy_helper.from_array(0.5 * numpy_helper.to_array(weight), weight.name))
    half.unlink()
    onnx.save(graph, half)
    rescored = scored(tiny_checkpoint, "--onnx-root", root, "--dit", half)
    rolled = rescored["rollouts"]
    assert rolled["worst"]["half"] < 0.999 < rolled["worst"]["export"]
    assert rolled["met"] is False
    assert (document["dit"], rescored["dit"]) == (None, {half.name: files.sha256_of(half)})
    assert rescored["autoencoder"] == document["autoencoder"]
    for score_now, score_before in ((rescored[part], document[part]) for part in ("balance_db", "inpainting")):
        assert score_now != score_before


def test_the_first_clips_lie_beside_the_data(document: Document, out: Path) -> None:
    names = [f"prompt_{i:02d}_{kind}" for i in range(2) for kind in ("data", "generated")]
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.{end}" for name in names for end in ("png", "wav")]
    made = {name: soundfile.read(out / f"{name}.wav", dtype="int16") for name in names}
    assert {(samples.shape, rate) for samples, rate in made.values()} == {((2 * 44100, 2), 44100)}
    assert len({samples.tobytes() for samples, _ in made.values()}) == 4
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_second_run_gives_the_same_document(
    document: Document, tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, out: Path
) -> None:
    again = scored(tiny_checkpoint, "--onnx-root", tiny_onnx, "--out", tmp_path / "clips")
    assert set(again["seconds"]) == {"load", "autoencoder", "text_to_audio", "inpainting", "rollouts"}
    assert {**again, "seconds": 0} == {**document, "seconds": 0}
    assert listing(tmp_path / "clips") == listing(out)


def test_another_seed_and_another_form_give_others(document: Document, tiny_checkpoint: Path) -> None:
    rescored = scored(tiny_checkpoint, "--seed", 50, "--form", "request")
    assert rescored["rollouts"] is None
    assert [row["caption"] for row in rescored["prompts"]] == [
        draw_piece(FIRST_HELD_OUT + i, 2).request() for i in range(2)
    ]
    assert rescored["autoencoder"] == document["autoencoder"]
    assert rescored["inpainting"]["conditioned"] != document["inpainting"]["conditioned"]


def test_the_tables(tiny_checkpoint: Path) -> None:
    result = run(score_demo_model.main, ["--checkpoint", tiny_checkpoint, *SMALL, "--prompts", 1])
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    (data,) = [line for line in lines if line.startswith("the data itself")]
    assert data.split()[3].endswith("/1")
    (chance,) = [line for line in lines if "other captions" in line]
    assert chance.split()[-6:] == ["0/0", "-", "0/0", "-", "0/0", "-"]  # one prompt has no other
    assert any("identical samples" in line for line in lines)
    assert "text to audio: " in result.err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, ["model_config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), ["model.safetensors"]),
    ],
    ids=["no folder", "no weights", "torn weights"],
)
def test_a_wrong_folder_is_said_in_two_lines(
    tiny_checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], object], words: list[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    spoil(folder)
    assert_user_error(run(score_demo_model.main, ["--checkpoint", folder]), *words)


def test_a_wrong_root_and_a_wrong_destination_are_said_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    before = listing(tmp_path)
    assert_user_error(
        run(score_demo_model.main, ["--checkpoint", tiny_checkpoint, "--onnx-root", tmp_path]), "sa3-m/dit.onnx"
    )
    assert_user_error(
        run(score_demo_model.main, ["--checkpoint", tiny_checkpoint, "--out", tmp_path / "file"]), "--out"
    )
    assert_user_error(
        run(score_demo_model.main, ["--checkpoint", tiny_checkpoint, "--dit", tmp_path / "no.onnx"]), "no.onnx"
    )
    assert listing(tmp_path) == before


def test_agreement_counts_the_tolerance_the_key_and_its_relative() -> None:
    pieces = [draw_piece(seed) for seed in range(4)]
    relatives = {"major": (9, "minor"), "minor": (3, "major")}
    up, mode = relatives[pieces[1].mode]
    estimates = [
        score.Estimates(pieces[0].bpm * 1.0399, (pieces[0].tonic, pieces[0].mode)),
        score.Estimates(pieces[1].bpm * 0.9601, ((pieces[1].tonic + up) % 12, mode)),
        score.Estimates(pieces[2].bpm * 1.0401, ((pieces[2].tonic + 1) % 12, pieces[2].mode)),
        score.Estimates(None, None),
    ]
    assert score.agreement(estimates, pieces, [(i, i) for i in range(4)]) == {
        "of": 4,
        "tempo": {"hits": 2, "rate": 0.5},
        "key": {"hits": 1, "rate": 0.25},
        "notes": {"hits": 2, "rate": 0.5},
    }
    assert score.agreement(estimates, pieces, [(3, 0)])["notes"] == {"hits": 0, "rate": 0.0}


def test_level_differences_are_of_each_band() -> None:
    generator = np.random.default_rng(0)
    noise = [(3000 * generator.standard_normal((44100, 2))).astype(np.int16) for _ in range(2)]
    same = score.level_differences(noise, noise)
    assert set(same.values()) == {0.0} and "all" in same
    assert score.level_differences([samples // 2 for samples in noise], noise)["all"] == pytest.approx(-6.0, abs=0.1)
    assert score.level_differences([0 * samples for samples in noise], noise)["all"] is None


def test_a_figure_that_is_not_finite_is_null() -> None:
    assert [score.number(value) for value in (1 / 3, float("inf"), float("nan"))] == [0.333333, None, None]
    assert score.summary([1.0, 2.0, 6.0]) == {"mean": 3.0, "least": 1.0, "greatest": 6.0}
    assert set(score.summary([1.0, None]).values()) == set(score.summary([]).values()) == {None}
