"""The demonstration model: its synthetic music, a few training steps, and the shipped weights."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import make_demo_checkpoint
import numpy as np
import pytest
import torch
import train_demo_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reprompt
from helpers.commands import ROOT, assert_user_error, kill_when, listing, run
from reprompt import deployed_text
from sa3_build.calibration.capture import CheckpointModel
from sa3_build.export import load_modules as native
from sa3_build.export.model_config import load_geometry
from sa3_demo import latents, music, plan, ship, stage_autoencoder, stage_flow, state, trainer
from sa3_demo.pool import LoopPool
from sa3_demo.synth import render
from sa3_trt_core.sampling import schedule

SHIPPED = ROOT / "interface" / "demo_model"
MAX_BYTES = 24 << 20


def test_a_piece_is_the_same_everywhere_and_its_caption_says_it() -> None:
    piece = music.draw_piece(7)
    assert piece == music.draw_piece(7) and piece != music.draw_piece(8)
    text = deployed_text(piece.example())
    for fact in (f"Tempo: {piece.bpm} BPM.", f"Key: {piece.key}.", piece.groove.genre, piece.chord, piece.bass_line):
        assert fact in text
    for seed in range(50):
        drawn = music.draw_piece(seed)
        assert f"{drawn.bpm} BPM" in drawn.request() and drawn.key in drawn.request()


def test_tempo_and_key_say_nothing_of_the_rest() -> None:
    """Every tempo and key is about equally frequent, also within one genre."""
    pieces = [music.draw_piece(seed) for seed in range(4000)]
    for group in (pieces, [piece for piece in pieces if piece.groove.genre == "house"]):
        for values, kinds in (([p.bpm for p in group], 18), ([p.key for p in group], 24)):
            counts = [values.count(value) for value in set(values)]
            assert len(counts) == kinds
            assert max(counts) < 2.2 * len(group) / kinds


@pytest.mark.parametrize("seed", [0, 3, music.FIRST_HELD_OUT])
def test_a_loop_has_its_length_is_heard_and_is_not_clipped(seed: int) -> None:
    piece = music.draw_piece(seed, 4)
    sound = render(piece)
    assert sound.shape == (2, 4 * 44100) and sound.dtype == np.float32
    assert 0.1 < np.sqrt(np.square(sound).mean()) < 0.2 and np.abs(sound).max() < 0.95
    assert np.array_equal(sound, render(piece))
    assert not np.allclose(sound[0], sound[1])  # stereo
    assert np.array_equal(sound[:, : 2 * 44100 - 441], render(replace(piece, seconds=4))[:, : 2 * 44100 - 441])


def test_a_dark_dry_piece_differs_from_a_bright_spacious_one_where_it_says() -> None:
    piece = replace(music.draw_piece(3, 4), lead="square lead", colour="bright", space="dry")

    def brightness(sound: np.ndarray) -> float:
        power = np.square(np.abs(np.fft.rfft(sound[0])))
        return float(power[len(power) // 10 :].sum() / power.sum())

    assert brightness(render(piece)) > 1.2 * brightness(render(replace(piece, colour="dark")))
    wide = render(replace(piece, space="spacious"))
    assert np.corrcoef(wide[0], wide[1])[0, 1] < np.corrcoef(*render(piece))[0, 1]


def test_the_pool_holds_the_loops_of_its_seeds() -> None:
    with LoopPool(3, (4,), workers=2) as pool:
        samples, offsets = pool.on_device(3, torch.device("cpu"))
    for index in range(3):
        expected = np.round(render(music.draw_piece(index, 4)).T * 32767)
        assert np.array_equal(samples[offsets[index] : offsets[index + 1]].numpy(), expected)


def test_crops_are_stretches_of_the_loops_with_silence_outside() -> None:
    frames, size = 2, 2 * 4096
    samples = torch.arange(1, 3 * size + 1, dtype=torch.int16).unsqueeze(1).repeat(1, 2)
    offsets = torch.tensor([0, size, 3 * size])
    generator = torch.Generator().manual_seed(0)
    crops = stage_autoencoder.draw_crops(samples, offsets, 200, frames, generator) * 32767
    assert crops.shape == (200, 2, size)
    for row in crops[:, 0].round().long():
        audible = row[row != 0]
        assert len(audible) >= size // 2 and bool((audible.diff() == 1).all())  # one stretch, whole
        assert bool(((audible <= size) == (audible[0] <= size)).all())  # of one loop
    silent = (crops[:, 0] == 0).any(dim=1).float().mean()
    assert 0.02 < silent < 0.2


def test_keep_masks_leave_out_one_span_of_the_music_in_half_of_the_rows() -> None:
    frames = torch.full((400,), 43.0)
    keep = latents.keep_masks(torch.Generator().manual_seed(0), frames, 64, share=0.5)[:, 0]
    plain = keep.sum(dim=1) == 0
    assert 0.4 < plain.float().mean() < 0.6
    for row in keep[~plain]:
        gone = (row[:43] == 0).nonzero()[:, 0]
        assert len(gone) >= 4 and bool((gone.diff() == 1).all())
        assert bool((row[43:] == 0).all())  # nothing is kept after the music, as in deployment


def test_training_noise_levels_are_the_samplers() -> None:
    grid = schedule.sigmas(stage_flow.GRID_STEPS)
    u = torch.linspace(1.0, 0.0, stage_flow.GRID_STEPS + 1)
    assert torch.equal(stage_flow.warped(u), grid)
    drawn = stage_flow.draw_sigmas(torch.Generator().manual_seed(0), 4000, torch.device("cpu"))
    assert 0.0 < drawn.min() < 0.1 and drawn.max() == 1.0
    on_grid = torch.isin(drawn, grid).float().mean()
    assert 0.15 < on_grid < 0.25


def test_the_learning_rate_warms_up_after_every_interruption_and_falls() -> None:
    stage = plan.StagePlan(steps=1000, batch=1, learning_rate=1.0, warmup=10)
    rates = [trainer.learning_rate(stage, step, 500) for step in range(500, 1000)]
    assert rates[0] < 0.1 and rates[9] == max(rates) and rates[-1] == pytest.approx(trainer.LAST_SHARE, abs=1e-3)


def test_state_shards_are_under_their_limit_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "MAX_FILE_BYTES", 4096)
    saved = state.TrainingState(stage="flow", step=3, notes=[{"loss": 1.0}])
    saved.replace("model", {f"w{index}": torch.randn(600) for index in range(9)})
    state.save(tmp_path, saved)
    state.save(tmp_path, saved)
    shards = list(tmp_path.glob("*.safetensors"))
    assert len(shards) == 3 and all(shard.stat().st_size < 4096 + 1000 for shard in shards)
    again = state.load(tmp_path)
    assert (again.stage, again.step, again.notes) == ("flow", 3, [{"loss": 1.0}])
    assert all(torch.equal(again.tensors[key], value) for key, value in saved.tensors.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model trained for a few steps: killed after its autoencoder, stopped by a deadline, resumed."""
    folder = tmp_path_factory.mktemp("train")
    argv = ["--work", folder / "work", "--tiny", "--workers", 1, "--ship", folder / "shipped"]
    index = folder / "work" / "state" / "state.json"
    command = [sys.executable, str(ROOT / "build" / "train_demo_model.py"), *map(str, argv)]
    kill_when(command, lambda: index.is_file() and '"stage": "flow"' in index.read_text())
    kept = state.load(index.parent)
    stopped = run(train_demo_model.main, [*argv, "--minutes", 0.001, "--copy-state", folder / "copy"])
    assert stopped.code == 0 and "run the same command to continue" in stopped.out, stopped.err
    assert not (folder / "shipped").exists()
    assert json.loads((folder / "copy" / "state.json").read_text())["stage"] == "flow"
    completed = run(train_demo_model.main, argv)
    assert (
        completed.code == 0 and f"{folder / 'work'}: done" in completed.out and "train autoencoder" not in completed.err
    ), completed.err
    result = state.load(index.parent)
    autoencoder = {key: value for key, value in kept.tensors.items() if key.startswith("autoencoder/")}
    assert autoencoder and all(torch.equal(result.tensors[key], value) for key, value in autoencoder.items())
    return folder


def test_the_stages_run_in_order_with_finite_losses(trained: Path) -> None:
    notes = json.loads((trained / "shipped" / "training.json").read_text())["losses"]
    assert list(dict.fromkeys(note["stage"] for note in notes)) == ["autoencoder", "flow", "distillation"]
    assert all(np.isfinite(note["total"]) for note in notes)
    assert run(train_demo_model.main, ["--work", trained / "work", "--tiny"]).out.endswith(": done\n")


def test_what_is_shipped_makes_a_checkpoint_that_generates(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    ship.write_checkpoint(trained / "shipped", tmp_path / "made", seed=0)
    config, weights = tmp_path / "made" / "model_config.json", tmp_path / "made" / "model.safetensors"
    native.check(native.NativeWeights(weights), load_geometry(config))
    stored = load_file(weights)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    shipped = load_file(trained / "shipped" / "dit.safetensors")
    assert torch.equal(stored["model.model.transformer.project_in.weight"], shipped["dit.proj_in.weight"].float())
    model = CheckpointModel(config, weights, "cpu")
    hidden = model.conditioning("House, 120 BPM, A minor", 4.0, 8).t5_hidden
    encoder = load_file(trained / "shipped" / "text.safetensors")
    assert hidden.shape == (1, 256, 768) and all(tensor.dtype == torch.bfloat16 for tensor in encoder.values())


def test_latents_have_mean_zero_and_deviation_one(trained: Path) -> None:
    """Latents of the measured loops are normalised, and the decoded sound has not changed."""
    saved = state.load(trained / "work" / "state")
    autoencoder = native.build_autoencoder(load_geometry(trained / "work" / "state" / "model_config.json").autoencoder)
    autoencoder.load_state_dict(saved.part("autoencoder"))
    with LoopPool(plan.TINY.loops, plan.TINY.lengths, workers=1) as pool, torch.no_grad():
        sample = torch.cat(
            [
                stage_autoencoder.encode_loop(autoencoder, pool, i, torch.device("cpu"))[0]
                for i in range(plan.TINY.loops)
            ],
            dim=1,
        )
        assert abs(float(sample.std()) - 1.0) < 0.01 and float(sample.mean(dim=1).abs().max()) < 0.02
        before = autoencoder.decode(sample[None, :, :8]).sample
        autoencoder.bottleneck.running_std.mul_(3.0)
        moved = autoencoder.encode(torch.zeros(1, 2, 8 * 4096)).latents
        stage_autoencoder.centre_latents(autoencoder, pool, torch.device("cpu"))
        again = autoencoder.encode(torch.zeros(1, 2, 8 * 4096)).latents
        assert not torch.allclose(moved, again, atol=1e-3)
        fresh = torch.cat(
            [
                stage_autoencoder.encode_loop(autoencoder, pool, i, torch.device("cpu"))[0]
                for i in range(plan.TINY.loops)
            ],
            dim=1,
        )
        assert torch.allclose(autoencoder.decode(fresh[None, :, :8]).sample, before, atol=1e-3)


def test_training_goes_on_from_shipped_weights_that_are_not_distilled(trained: Path, tmp_path: Path) -> None:
    shipped = shutil.copytree(trained / "shipped", tmp_path / "shipped")
    argv = ["--work", tmp_path / "work", "--tiny", "--workers", 1, "--start-from", shipped]
    assert_user_error(run(train_demo_model.main, argv), str(shipped))
    made = json.loads((shipped / "training.json").read_text())
    (shipped / "training.json").write_text(json.dumps({**made, "stage": "distillation", "step": 0}))
    result = run(train_demo_model.main, [*argv, "--ship", tmp_path / "more"])
    assert result.code == 0 and "train distillation" in result.err and "train flow" not in result.err, result.err
    before, after = (load_file(folder / "dit.safetensors") for folder in (shipped, tmp_path / "more"))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    text = [load_file(folder / "text.safetensors") for folder in (shipped, tmp_path / "more")]
    assert all(torch.equal(text[0][key], text[1][key]) for key in text[0])  # not distilled


def test_the_rest_is_trained_anew_on_a_shipped_autoencoder(trained: Path, tmp_path: Path) -> None:
    shipped, more = trained / "shipped", tmp_path / "more"
    line = ["--work", tmp_path / "work", "--tiny", "--workers", 1, "--start-from", shipped, "--from-stage", "flow",
            "--ship", more, "--note", "masks have changed"]  # fmt: skip
    flow = run(train_demo_model.main, [*line, "--stages", 1])
    assert flow.code == 0 and "distillation, step 0: run the same command to continue" in flow.out, flow.err
    assert "train autoencoder" not in flow.err and "train flow" in flow.err
    done = run(train_demo_model.main, line)
    assert done.code == 0 and done.out.endswith(": done\n") and "train flow" not in done.err, done.err
    for file in (ship.TOKENIZER_FILE, "autoencoder.safetensors"):
        assert (more / file).read_bytes() == (shipped / file).read_bytes()
    for file in ("dit", "text"):
        before, after = (load_file(folder / f"{file}.safetensors") for folder in (shipped, more))
        assert before.keys() == after.keys()
    first, again = (json.loads((folder / "training.json").read_text()) for folder in (shipped, more))
    assert list(dict.fromkeys(note["stage"] for note in again["losses"])) == ["autoencoder", "flow", "distillation"]
    assert again["kept"] == {"autoencoder": first["made_with"]} and again["made_with"]["note"] == "masks have changed"


@pytest.mark.parametrize(
    ("flags", "named"), [(["--from-stage", "flow"], "--start-from"), (["--start-from", SHIPPED], "another size")]
)
def test_a_start_that_cannot_be_is_refused(tmp_path: Path, flags: list[str | Path], named: str) -> None:
    assert_user_error(run(train_demo_model.main, ["--work", tmp_path / "work", "--tiny", *flags]), named)
    assert listing(tmp_path) == {}


def test_a_shortened_stage_is_one_stage_of_its_own_size(trained: Path, tmp_path: Path) -> None:
    """For machines without a GPU: the given steps, rows and loops; the next stage is not started."""
    shipped = shutil.copytree(trained / "shipped", tmp_path / "shipped")
    made = json.loads((shipped / "training.json").read_text())
    (shipped / "training.json").write_text(json.dumps({**made, "stage": "flow", "step": 0}))
    argv = ["--work", tmp_path / "work", "--tiny", "--workers", 1, "--start-from", shipped, "--ship", tmp_path / "more"]
    result = run(train_demo_model.main, [*argv, "--shorten", 2, 1, 3])
    assert result.code == 0 and "distillation, step 0" in result.out and "2/2 steps" in result.err, result.err
    written = json.loads((tmp_path / "more" / "training.json").read_text())
    assert (written["plan"]["loops"], written["plan"]["flow"]["steps"], written["plan"]["flow"]["batch"]) == (3, 2, 1)
    assert written["plan"]["flow"]["learning_rate"] == pytest.approx(plan.TINY.flow.learning_rate / 2**0.5)
    assert written["stage"] == "distillation"
    assert "done" in run(train_demo_model.main, [*argv, "--shorten", 1, 1, 3]).out
    assert_user_error(run(train_demo_model.main, [*argv, "--shorten", 1, 1, 3]), "is complete")


def test_full_training_needs_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        assert_user_error(run(train_demo_model.main, ["--work", tmp_path / "work"]), "GPU")
        assert listing(tmp_path) == {}


def test_the_repositorys_weights_are_16_bit_small_and_whole(tmp_path: Path) -> None:
    files = [SHIPPED / f"{part}.safetensors" for part in ship.PARTS]
    adapter = SHIPPED / "room.safetensors"
    weights = [file for file in SHIPPED.iterdir() if file.suffix != ".md" and file != adapter]
    assert sum(file.stat().st_size for file in weights) <= MAX_BYTES and adapter.stat().st_size < 1 << 20
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "BF16"}, file
    assert (SHIPPED / "README.md").is_file()
    result = run(make_demo_checkpoint.main, ["--out", tmp_path / "checkpoint"])
    assert result.code == 0, result.err
    assert "trained weights" in result.out
    assert "is current" in run(make_demo_checkpoint.main, ["--out", tmp_path / "checkpoint"]).out
    native.check(
        native.NativeWeights(tmp_path / "checkpoint" / "model.safetensors"),
        load_geometry(tmp_path / "checkpoint" / "model_config.json"),
    )


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "dit.safetensors").unlink(), "dit.safetensors"),
        (lambda folder: (folder / "dit.safetensors").write_bytes(b"torn"), "dit.safetensors"),
        (lambda folder: save_file({"x": torch.zeros(1)}, folder / "autoencoder.safetensors"), "training.json"),
    ],
    ids=["absent", "torn", "another model's"],
)
def test_spoilt_weights_are_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object, named: str
) -> None:
    shutil.copytree(SHIPPED, tmp_path / "place" / "demo_model")
    monkeypatch.setattr(reprompt, "__file__", str(tmp_path / "place" / "reprompt.py"))
    spoil(tmp_path / "place" / "demo_model")  # type: ignore[operator]
    (tmp_path / "out").mkdir()
    assert_user_error(run(make_demo_checkpoint.main, ["--out", tmp_path / "out" / "checkpoint"]), named)
    assert listing(tmp_path / "out") == {}


@pytest.mark.parametrize("flag", ["--width 128", "--depth 2", "--geometry medium"])
def test_sizes_belong_to_random_weights(tmp_path: Path, flag: str) -> None:
    assert_user_error(
        run(make_demo_checkpoint.main, ["--out", tmp_path / "a", *flag.split()]), flag.split(maxsplit=1)[0]
    )
    assert listing(tmp_path) == {}


def test_a_run_saves_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed within a stage resumes from the last save, not from the stage's beginning."""
    monkeypatch.setattr(trainer, "KEEP_SECONDS", 0.0)
    weights = torch.nn.Parameter(torch.ones(4))
    stage = plan.StagePlan(steps=5, batch=1, learning_rate=0.1, warmup=1)
    saves = []
    trainer.train(
        "flow", stage, [weights], lambda step: {"total": (weights**2).sum()}, 2, trainer.Deadline(None),
        lambda step, notes: saves.append((step, weights.detach().clone())),
    )  # fmt: skip
    assert [step for step, _ in saves] == [3, 4, 5]
    assert all(later.sum() < earlier.sum() for (_, earlier), (_, later) in itertools.pairwise(saves))
