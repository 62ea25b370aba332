"""Faults inside a checkpoint or a calibration set: the producing commands name them and write nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import damage
from helpers.commands import assert_user_error, listing, run
from sa3_trt_core.targets import find_target

DIT_KEY = "model.model.transformer.layers.0.ff.ff.2.weight"
DECODER_KEY = "pretransform.model.decoder.layers.3.transformers.0.ff.ff.2.weight"
PADDING_KEY = "conditioner.conditioners.prompt.padding_embedding"
SECONDS_KEY = "conditioner.conditioners.seconds_total.embedder.embedding.1.weight"
TEXT_FOLDER = "t5gemma-b-b-ul2"
DIT_SIZES = "model.diffusion.config"
CODEC_SIZES = "model.pretransform.config"


Edit = Callable[[damage.Weights, str], object]
EDITS: dict[str, Edit] = {
    "drop": lambda weights, key: weights.pop(key),
    "rename": lambda weights, key: weights.update({key + "s": weights.pop(key)}),
    "add": lambda weights, key: weights.update({key: torch.ones(2)}),
    "widen": lambda weights, key: weights.update({key: torch.cat([weights[key], weights[key]])}),
    "transpose": lambda weights, key: weights.update({key: weights[key].T.contiguous()}),
}
DIT_FAULTS = [
    *((edit, DIT_KEY) for edit in ("drop", "rename", "widen", "transpose")),
    ("add", "model.model.transformer.layers.1.surplus"),
    ("drop", PADDING_KEY),
    ("widen", PADDING_KEY),
    ("widen", SECONDS_KEY),
    ("add", "conditioner.surplus"),
    ("add", "surplus.weight"),
]
DECODER_FAULTS = [
    *((edit, DECODER_KEY) for edit in ("drop", "rename", "widen")),
    ("add", "pretransform.model.decoder.surplus"),
]


@pytest.fixture
def spoilt(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkpoint for this test to damage; the commands write beside it."""
    return damage.copy_checkpoint(tiny_checkpoint, tmp_path / "checkpoint")


def spoil(file: Path, edit: str, key: str) -> None:
    damage.edit_weights(file, lambda weights: EDITS[edit](weights, key))


def calibrate_refuses(folder: Path, *words: str) -> None:
    """Assert that make_calib refuses a damaged checkpoint; a valid one would be captured in seconds."""
    import make_calib

    config, weights = folder / "model_config.json", folder / "model.safetensors"
    argv = ["--model-config", config, "--checkpoint", weights, "--out", folder.parent / "out" / "c.calib.npz"]
    unchanged(make_calib.main, [*argv, "--prompts", 1, "--duration", 0.5, "--steps", 1], folder.parent, *words)


def export_refuses(folder: Path, *words: str, only: str | None = None) -> None:
    """Assert that export_onnx refuses a damaged checkpoint, for one part or all."""
    import export_onnx

    argv = ["--model-dir", folder, "--onnx-root", folder.parent / "out", *(["--only", only] if only else [])]
    unchanged(export_onnx.main, argv, folder.parent, *words)


def unchanged(main: Callable[[list[str]], int], line: list[object], folder: Path, *words: str) -> None:
    before = listing(folder)
    result = run(main, line)
    assert_user_error(result, *words)
    assert listing(folder) == before


@pytest.mark.parametrize(("edit", "key"), DIT_FAULTS)
def test_calibration_names_the_native_key(spoilt: Path, edit: str, key: str) -> None:
    spoil(spoilt / "model.safetensors", edit, key)
    calibrate_refuses(spoilt, f"tensor {key}")


@pytest.mark.parametrize(("part", "edit", "key"), [("dit", *DIT_FAULTS[2]), *(("decoder", *f) for f in DECODER_FAULTS)])
def test_the_export_names_the_native_key(spoilt: Path, part: str, edit: str, key: str) -> None:
    spoil(spoilt / "model.safetensors", edit, key)
    export_refuses(spoilt, f"tensor {key}", only=part)


def test_the_whole_export_checks_every_part_before_it_writes_one(spoilt: Path) -> None:
    spoil(spoilt / "model.safetensors", "drop", DECODER_KEY)
    export_refuses(spoilt, f"tensor {DECODER_KEY}")


def test_a_shape_is_told_with_the_one_expected(spoilt: Path) -> None:
    spoil(spoilt / "model.safetensors", "widen", PADDING_KEY)
    calibrate_refuses(spoilt, "[1536]", "[768]")


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, b"\xff" * 64, None])
def test_weights_that_are_no_safetensors_are_named(spoilt: Path, content: bytes | None) -> None:
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000] if content is None else content)
    calibrate_refuses(spoilt, str(file))
    export_refuses(spoilt, str(file))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_text_encoder_is_named(spoilt: Path, name: str) -> None:
    (spoilt / TEXT_FOLDER / name).unlink()
    calibrate_refuses(spoilt, TEXT_FOLDER)
    export_refuses(spoilt, TEXT_FOLDER, only="text")


def test_a_text_encoder_without_a_tensor_is_named(spoilt: Path) -> None:
    key = "model.encoder.layers.0.mlp.up_proj.weight"
    spoil(spoilt / TEXT_FOLDER / "model.safetensors", "drop", key)
    calibrate_refuses(spoilt, "layers.0.mlp.up_proj.weight", "is missing")


@pytest.mark.parametrize("text", ["", "{", "weights", '{"model": ' * 50_000, "\udcff"])
def test_a_config_that_is_not_json_is_named(spoilt: Path, text: str) -> None:
    (spoilt / "model_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    calibrate_refuses(spoilt, "model_config.json", "is not JSON")


@pytest.mark.parametrize(
    "path",
    [
        "sample_rate",
        "model",
        "model.diffusion.diffusion_objective",
        "model.conditioning.cond_dim",
        "model.conditioning.configs",
        *(f"{DIT_SIZES}.{name}" for name in ("embed_dim", "depth", "num_heads", "ff_kwargs.mult", "io_channels")),
        *(f"{DIT_SIZES}.{name}" for name in ("cond_token_dim", "num_memory_tokens", "attn_kwargs.differential")),
        *(f"{CODEC_SIZES}.{name}" for name in ("latent_dim", "downsampling_ratio", "encoder.config.channels")),
        f"{CODEC_SIZES}.decoder.config.strides",
    ],
)
def test_a_missing_value_is_named_by_its_path(spoilt: Path, path: str) -> None:
    damage.edit_config(spoilt / "model_config.json", path, delete=True)
    calibrate_refuses(spoilt, "model_config.json", path, "is missing")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (f"{DIT_SIZES}.embed_dim", "128", "embed_dim must be a whole number"),
        (f"{DIT_SIZES}.embed_dim", True, "embed_dim must be a whole number"),
        (f"{DIT_SIZES}.embed_dim", -128, "embed_dim must be a whole number"),
        (f"{DIT_SIZES}.num_heads", 3, "num_heads"),
        (f"{DIT_SIZES}.ff_kwargs.mult", float("nan"), "mult"),
        (f"{DIT_SIZES}.ff_kwargs.mult", -1.0, "mult"),
        (f"{DIT_SIZES}.attn_kwargs.differential", "no", "differential"),
        (f"{CODEC_SIZES}.decoder.config.strides", 16, "strides"),
        (f"{CODEC_SIZES}.encoder.config.transformer_depths", [3, 3], "transformer_depths"),
        (f"{CODEC_SIZES}.decoder.config.sinusoidal_blocks", [99], "sinusoidal_blocks"),
        (f"{CODEC_SIZES}.downsampling_ratio", 1, "downsampling_ratio"),
        ("model.diffusion.diffusion_objective", "v", "diffusion_objective"),
        ("model.conditioning.configs", 5, "model.conditioning.configs"),
        ("model.conditioning.configs", [], "prompt"),
        ("model.conditioning.configs.0.config.subfolder", "../elsewhere", "subfolder"),
        ("model.conditioning.configs.1.config.max_val", None, "max_val"),
    ],
)
def test_a_wrong_value_is_named_by_its_path(spoilt: Path, path: str, value: object, named: str) -> None:
    damage.edit_config(spoilt / "model_config.json", path, value)
    part = "decoder" if path.startswith(CODEC_SIZES) else "dit"
    export_refuses(spoilt, "model_config.json", named, only=part)


def changed(key: str, index: tuple[int, ...], value: float) -> Callable[[Path, damage.Arrays], None]:
    """Return a writer that sets one number of one member to `value`."""

    def write(path: Path, arrays: damage.Arrays) -> None:
        arrays[key][index] = value
        np.savez(path, **arrays)

    return write


def replaced(key: str, make: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path, damage.Arrays], None]:
    """Return a writer that replaces one member by `make(member)`; None removes it."""

    def write(path: Path, arrays: damage.Arrays) -> None:
        new = make(arrays.pop(key))
        np.savez(path, **arrays, **({} if new is None else {key: new}))

    return write


def with_members(**faults: object) -> Callable[[Path, damage.Arrays], None]:
    """Return a writer of an archive with a false `header` = (member, shape) or `bits` = (member, flags)."""

    def write(path: Path, arrays: damage.Arrays) -> None:
        name, shape = faults.get("header", ("", None))  # type: ignore[misc]
        members = {key: damage.npy_bytes(value, shape if key == name else None) for key, value in arrays.items()}
        damage.write_members(path, members, flags=dict([faults["bits"]]) if "bits" in faults else None)  # type: ignore[list-item]

    return write


def torn(share: float) -> Callable[[Path, damage.Arrays], None]:
    def write(path: Path, arrays: damage.Arrays) -> None:
        np.savez(path, **arrays)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


CALIBRATION_FAULTS = {
    "no member": (replaced("t5_mask", lambda a: None), ("t5_mask",)),
    "an axis too many": (replaced("seconds_total", lambda a: a[:, None]), ("seconds_total", "[8, 1]", "[8]")),
    "a row too few": (replaced("t5_hidden", lambda a: a[:-1]), ("t5_hidden", "[7, 256, 768]")),
    "another length": (replaced("local_add_cond", lambda a: a[..., :-1]), ("local_add_cond", "shape")),
    "no rows": (lambda p, a: np.savez(p, **{k: v[:0] for k, v in a.items()}), ("0 rows",)),
    "NaN": (changed("t5_hidden", (5, 3, 2), np.nan), ("row 5", "t5_hidden", "NaN")),
    "infinity": (changed("x", (7, 255, 69), np.inf), ("row 7", "of x", "infinity")),
    "minus infinity": (changed("local_add_cond", (0, 0, 0), -np.inf), ("row 0", "local_add_cond")),
    "sigma 0": (changed("t", (3,), 0.0), ("row 3", "sigma 0", "(0, 1]")),
    "sigma below 0": (changed("t", (3,), -0.5), ("row 3", "sigma -0.5")),
    "sigma above 1": (changed("t", (0,), 1.001), ("row 0", "sigma 1.001")),
    "half a mask": (changed("t5_mask", (2, 9), 0.5), ("row 2", "t5_mask")),
    "pickle": (replaced("t", lambda a: a.astype(object)), ("member t", "pickled objects")),
    "float64": (replaced("x", lambda a: a.astype(np.float64)), ("member x", "float64", "float32")),
    "float16": (replaced("x", lambda a: a.astype(np.float16)), ("member x", "float16")),
    "big endian": (replaced("t", lambda a: a.astype(">f4")), ("member t", "float32")),
    "Fortran order": (replaced("x", np.asfortranarray), ("member x", "Fortran")),
    "torn": (torn(0.5), ("npz archive",)),
    "all but torn": (torn(0.999), ("npz archive",)),
    "text": (lambda p, a: p.write_text("not an archive"), ("npz archive",)),
    "empty": (lambda p, a: p.write_bytes(b""), ("npz archive",)),
    "a header of a thousand rows": (with_members(header=("x", (1000, 256, 70))), ("member x", "header")),
    "a header of negative rows": (with_members(header=("x", (-8, 256, 70))), ("x",)),
    "headers and directory of a million rows": (lambda p, a: damage.write_false_row_count(p, a, 1 << 20), ("row 8",)),
    "headers and directory of too many rows": (
        lambda p, a: damage.write_false_row_count(p, a, 1 << 40),
        (f"{1 << 40} rows",),
    ),
    "encrypted": (with_members(bits=("x", damage.ENCRYPTED)), ()),
    "spoilt compression": (lambda p, a: damage.write_corrupt_deflate(p, a, "t5_mask"), ("t5_mask",)),
    "a header of gibberish": (lambda p, a: damage.write_gibberish_header(p, a, "t5_mask"), ("t5_mask",)),
}


@pytest.mark.parametrize("fault", CALIBRATION_FAULTS)
def test_a_bad_calibration_set_is_named(tiny_onnx: Path, tiny_calib: Path, tmp_path: Path, fault: str) -> None:
    import build_dit_fp8

    write, words = CALIBRATION_FAULTS[fault]
    bad = tmp_path / "bad.npz"
    with np.load(tiny_calib) as good:
        write(bad, dict(good))
    argv = ["--input", tiny_onnx / find_target("sa3-m").onnx[0], "--calib", bad, "--onnx", tmp_path / "out" / "x.onnx"]
    unchanged(build_dit_fp8.main, argv, tmp_path, str(bad), *words)


def test_the_unspoilt_set_is_taken(tiny_onnx: Path, tiny_calib: Path, tmp_path: Path) -> None:
    """The undamaged set, written the same way, is valid: each fault above is the only one in its file."""
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet

    shutil.copyfile(tiny_calib, tmp_path / "copy.npz")
    with np.load(tiny_calib) as good:
        with_members()(tmp_path / "stored.npz", dict(good))
        np.savez(tmp_path / "saved.npz", **good)
    ranges = [CalibrationSet.open(path).check_values() for path in sorted(tmp_path.iterdir())]
    assert len(ranges) == 3 and ranges[0] == ranges[1] == ranges[2]
