"""Adapter files of every naming scheme are read; unusable ones are refused in two lines, unused tensors are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sa3_lora
import torch

from helpers import adapters
from helpers.commands import assert_user_error, run
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.adapter import read_adapter
from sa3_trt_core.lora.lora_set import LoraSet, LoraSpec, parse_spec

LAYER = "model.transformer.layers.0.ff.ff.2"
OUT, INTO = adapters.LAYER_SHAPES[LAYER]


def factors(rank: int = 3, seed: int = 0, out: int = OUT, into: int = INTO) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((rank, into)).astype(np.float32),
        generator.standard_normal((out, rank)).astype(np.float32),
    )


def change_of(path: Path, layer: str = LAYER) -> np.ndarray:
    shape = adapters.LAYER_SHAPES[layer]
    return LoraSet.read([LoraSpec(path)]).merged(layer, torch.zeros(shape)).numpy()


@pytest.mark.parametrize(
    ("prefix", "first", "second"),
    [
        ("base_model.model.model.transformer.layers.0.ff.ff.2", "lora_A.weight", "lora_B.weight"),
        ("base_model.model.transformer.layers.0.ff.ff.2", "lora_A.default.weight", "lora_B.default.weight"),
        ("base_model.model.model.model.transformer.layers.0.ff.ff.2", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.model.transformer.layers.0.ff.ff.2", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.transformer.layers.0.ff.ff.2", "lora_down.weight", "lora_up.weight"),
        ("lora_unet_transformer_layers_0_ff_ff_2", "lora_down.weight", "lora_up.weight"),
        ("transformer.transformer_blocks.0.ff.proj_out", "lora_A.weight", "lora_B.weight"),
        ("transformer.layers.0.ff.ff.2.parametrizations.weight.0", "lora_A", "lora_B"),
        ("model.model.transformer.layers.0.ff.ff.2.parametrizations.weight.1", "lora_A", "lora_B"),
    ],
)
def test_names_of_other_programs_mean_the_native_layer(tmp_path: Path, prefix: str, first: str, second: str) -> None:
    into, out = factors()
    path = tmp_path / "other.safetensors"
    adapters.write_tensors(path, {f"{prefix}.{first}": into, f"{prefix}.{second}": out})
    adapter = read_adapter(path)
    assert list(adapter.layers) == [LAYER] and adapter.kind.name == "lora"
    assert any("alpha" in note for note in adapter.notes)
    np.testing.assert_allclose(change_of(path), out @ into, rtol=1e-5, atol=1e-5)


def test_alpha_comes_from_the_tensor_the_metadata_or_the_peft_folder(tmp_path: Path) -> None:
    into, out = factors()
    prefix = "diffusion_model.transformer.layers.0.ff.ff.2"
    pair = {f"{prefix}.lora_A.weight": into, f"{prefix}.lora_B.weight": out}
    adapters.write_tensors(tmp_path / "comfy.safetensors", pair | {f"{prefix}.alpha": np.array(1.5, np.float32)})
    np.testing.assert_allclose(change_of(tmp_path / "comfy.safetensors"), 0.5 * out @ into, rtol=1e-4, atol=1e-5)

    def peft(name: str, **config: object) -> Path:
        (tmp_path / name).mkdir()
        keys = {f"base_model.model.transformer.layers.0.ff.ff.2.{key.rpartition('ff.2.')[2]}": value
                for key, value in pair.items()}  # fmt: skip
        adapters.write_tensors(tmp_path / name / "adapter_model.safetensors", keys)
        settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, **config}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        return tmp_path / name

    np.testing.assert_allclose(change_of(peft("plain")), 2.0 * out @ into, rtol=1e-4, atol=1e-5)
    expected = 6 / np.sqrt(3) * out @ into
    np.testing.assert_allclose(change_of(peft("rslora", use_rslora=True)), expected, rtol=1e-4, atol=1e-4)
    pattern = peft("pattern", r=8, rank_pattern={"ff.ff.2": 3}, alpha_pattern={r"ff\.\d": 12})
    np.testing.assert_allclose(change_of(pattern), 4.0 * out @ into, rtol=1e-4, atol=1e-4)
    digests = {LoraSet.read([LoraSpec(tmp_path / name)]).digest for name in ("plain", "rslora", "pattern")}
    assert len(digests) == 3  # the same factors, other settings
    for config, word in (({"peft_type": "IA3"}, "IA3"), ({"init_lora_weights": "pissa"}, "pissa")):
        with pytest.raises(ToolError, match=word):
            read_adapter(peft(word, **config))


def test_rows_of_diffusers_names_are_put_in_native_order(tmp_path: Path) -> None:
    width = adapters.LAYER_SHAPES[adapters.QKV][1]
    into, out = factors(out=5 * width, into=width)
    q, q2, k, k2, v = np.split(out, 5)
    prefix = "transformer.transformer_blocks.0.self_attn.to_qkv"
    path = tmp_path / "diffusers.safetensors"
    adapters.write_tensors(path, {f"{prefix}.lora_A.weight": into, f"{prefix}.lora_B.weight": out})
    expected = np.concatenate([q, k, v, q2, k2]) @ into
    np.testing.assert_allclose(change_of(path, adapters.QKV), expected, rtol=1e-4, atol=1e-4)


def test_the_older_name_dora_means_columns_only_for_magnitudes_of_one_row(tmp_path: Path) -> None:
    into, out = factors()
    at = f"{LAYER}.parametrizations.weight.0."
    for shape, kind in (((1, INTO), "dora-cols"), ((OUT, 1), "dora-rows"), ((OUT,), "dora-rows")):
        tensors = {f"{at}lora_A": into, f"{at}lora_B": out, f"{at}magnitude": np.ones(shape, np.float32)}
        adapters.write_tensors(tmp_path / "d.safetensors", tensors, {"lora_config": '{"adapter_type": "dora"}'})
        adapter = read_adapter(tmp_path / "d.safetensors")
        assert adapter.kind.name == kind and adapter.layers[LAYER].tensors["magnitude"].shape == (max(shape),)


def test_factors_and_alphas_of_any_number_type_mean_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    into, out = (torch.from_numpy(side).mul(8).round() / 8 for side in factors(rank=4))
    at = "diffusion_model.transformer.layers.0.ff.ff.2"
    types = torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
    for number, kind in enumerate(types):
        alpha = torch.tensor([2]) if number % 2 else torch.tensor(2.0).to(kind)
        path = tmp_path / f"{number}.safetensors"
        save_file({f"{at}.lora_A.weight": into.to(kind), f"{at}.lora_B.weight": out.to(kind), f"{at}.alpha": alpha},
                  str(path))  # fmt: skip
        wanted = 0.5 * out.to(kind).double() @ into.to(kind).double()
        np.testing.assert_allclose(change_of(path), wanted.numpy(), rtol=1e-5, atol=1e-5)
    twice = LoraSet.read([LoraSpec(path), LoraSpec(path)])
    np.testing.assert_allclose(twice.merged(LAYER, torch.zeros(OUT, INTO)), 2.0 * wanted.float(), rtol=1e-5, atol=1e-5)
    assert sum("listed more than once" in note for note in twice.notes) == 1


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        ("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("oft_blocks", "OFT"), ("a1.weight", "GLoRA"), ("diff", "whole"),
        ("diff_b", "whole"), ("lora_mid.weight", "middle"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["diffusion_model.transformer.layers.0.ff.ff.2", "lora_unet_layers_0_ff_ff_2"])
def test_other_kinds_of_adapters_are_refused_by_name_partial_or_not(
    prefix: str, tensor: str, word: str, tmp_path: Path
) -> None:
    into, out = factors()
    path = tmp_path / "other.safetensors"
    mixed = {f"{prefix}.lora_A.weight": into, f"{prefix}.lora_B.weight": out}
    for beside in ({}, mixed):
        adapters.write_tensors(path, {**beside, f"{prefix}.{tensor}": np.ones((4, 4), np.float32),
                                      f"{prefix}.alpha": np.array(4.0, np.float32)})  # fmt: skip
        for partial in ([], ["--lora-partial"]):
            assert_user_error(run(sa3_lora.main, ["info", path, *partial]), word)


def test_parts_without_effect_are_named(tmp_path: Path) -> None:
    path = adapters.write_native(tmp_path / "a.safetensors", "lora", {LAYER: (OUT, INTO)})
    tensors, metadata = adapters.read_tensors(path)
    prefix = f"{LAYER}.parametrizations.weight.0."
    adapters.write_tensors(path, tensors | {f"{prefix}magnitude": np.ones(OUT, np.float32)}, metadata)
    assert any("magnitude" in note for note in read_adapter(path).notes)
    adapters.write_tensors(
        path, {key: value * 0 if "lora_B" in key else value for key, value in tensors.items()}, metadata
    )
    assert any("no effect" in note for note in read_adapter(path).notes)
    adapters.write_tensors(path, tensors | {f"{prefix}baked_vnorm_row": np.ones(OUT, np.float32)}, metadata)
    assert any("baked" in note for note in read_adapter(path).notes)
    with_text_encoder = {"text_encoder.layers.0.mlp.lora_A.weight": np.ones((3, 4), np.float32), **tensors}
    adapters.write_tensors(path, with_text_encoder, metadata)
    assert any("text_encoder" in note for note in read_adapter(path, partial=True).notes)


def damaged(folder: Path, fault: str) -> Path:
    """Write a file with the fault `fault`, which must be refused."""
    path = adapters.write_native(folder / "a.safetensors", "dora-rows", {LAYER: (OUT, INTO), adapters.QKV: (640, 128)})
    tensors, metadata = adapters.read_tensors(path)
    prefix, qkv = (f"{name}.parametrizations.weight.0." for name in (LAYER, adapters.QKV))
    match fault:
        case "unknown layer":
            tensors["text_model.encoder.layers.0.fc1.lora_A.weight"] = np.ones((4, 8), np.float32)
        case "lokr":
            tensors["diffusion_model.transformer.layers.0.ff.ff.2.lokr_w1"] = np.ones((4, 4), np.float32)
        case "missing factor":
            del tensors[f"{prefix}lora_B"]
        case "mixed ranks":
            tensors[f"{prefix}lora_A"], tensors[f"{prefix}lora_B"] = factors(rank=2)
        case "factors apart":
            tensors[f"{prefix}lora_B"] = factors(rank=2)[1]
        case "not finite":
            tensors[f"{qkv}lora_A"][0, 0] = np.nan
        case "two adapters":
            tensors[f"{LAYER}.parametrizations.weight.1.lora_A"] = factors(rank=4)[0]
        case "unknown kind":
            metadata = {"lora_config": '{"adapter_type": "loha"}'}
        case "bad config":
            metadata = {"lora_config": "{rank: 4"}
        case "alpha not finite":
            tensors[f"diffusion_model.{LAYER}.alpha"] = np.array(np.nan, np.float32)
        case "alpha of two":
            tensors[f"diffusion_model.{LAYER}.alpha"] = np.ones(2, np.float32)
        case "no rows":
            tensors[f"{prefix}lora_A"], tensors[f"{prefix}lora_B"] = np.ones((0, INTO)), np.ones((OUT, 0))
        case "bad rank":
            metadata = {"lora_config": '{"rank": "four", "adapter_type": "dora-rows"}'}
        case "no adapter":
            tensors = {"model.model.to_cond_embed.0.weight": np.ones((4, 8), np.float32)}
    adapters.write_tensors(path, tensors, metadata)
    if fault == "cut short":
        path.write_bytes(path.read_bytes()[:-10])
    if fault == "pickle":
        path = folder / "a.ckpt"
        torch.save({"state_dict": {}, "lora_config": {}}, path)
    if fault == "empty":
        path.write_bytes(b"")
    if fault == "html":
        path.write_bytes(b"<!doctype html><html>404</html>")
    if fault == "lfs":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return path


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("unknown layer", "text_model"), ("lokr", "lokr_w1"), ("alpha not finite", "alpha is not one"),
        ("alpha of two", "alpha is not one"),
        ("no rows", "[0, 512]"), ("missing factor", "lora_B"), ("mixed ranks", "rank 2"),
        ("factors apart", LAYER), ("not finite", "finite"), ("two adapters", "more than one"),
        ("unknown kind", "loha"), ("bad config", "JSON"), ("bad rank", "four"), ("no adapter", "no LoRA factors"),
        ("cut short", "truncated"), ("pickle", "pickle"), ("empty", "too short"), ("html", "whole safetensors"),
        ("lfs", "LFS"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_in_two_lines(tmp_path: Path, fault: str, word: str) -> None:
    assert_user_error(run(sa3_lora.main, ["info", damaged(tmp_path, fault)]), word)


def test_an_adapter_of_another_width_or_depth_names_what_fits_and_what_does_not(tmp_path: Path) -> None:
    path = adapters.write_native(
        tmp_path / "wide.safetensors", "dora-rows", {LAYER: (1024, 4096), adapters.QKV: (640, 128)}
    )
    with pytest.raises(ToolError, match=r"1 of 2 layers fit; .*ff\.ff\.2 is 1024 x 4096, the model's is 128 x 512"):
        LoraSet.read([LoraSpec(path)]).require_fits(adapters.LAYER_SHAPES, "the model")
    deep = adapters.write_native(tmp_path / "deep.safetensors", "lora", {LAYER.replace("0", "9"): (OUT, INTO)})
    with pytest.raises(ToolError, match=r"0 of 1 layers fit; .*the model has no layer"):
        LoraSet.read([LoraSpec(deep)]).require_fits(adapters.LAYER_SHAPES, "the model")
    columns = adapters.write_native(tmp_path / "c.safetensors", "dora-cols", {LAYER: (OUT, INTO)})
    tensors, metadata = adapters.read_tensors(columns)
    tensors[f"{LAYER}.parametrizations.weight.0.magnitude"] = np.ones(OUT, np.float32)
    adapters.write_tensors(columns, tensors, metadata)
    with pytest.raises(ToolError, match=f"{OUT} values of magnitude"):
        LoraSet.read([LoraSpec(columns)]).require_fits(adapters.LAYER_SHAPES, "the model")


def test_a_strength_follows_the_last_colon(tmp_path: Path) -> None:
    named = tmp_path / "odd:2.safetensors"
    named.touch()
    assert parse_spec(str(named)) == LoraSpec(named) and parse_spec(f"{named}:-0.5") == LoraSpec(named, -0.5)
    assert parse_spec("a.safetensors") == LoraSpec(Path("a.safetensors"))
    for text in ("a.safetensors:", "a.safetensors:x", "a.safetensors:nan", "a.safetensors:1e9"):
        with pytest.raises(ToolError):
            parse_spec(text)


def test_info_says_kind_rank_layers_words_and_the_change(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = tiny_checkpoint / "model.safetensors"
    shapes = {LAYER: (OUT, INTO), adapters.DURATION: adapters.LAYER_SHAPES[adapters.DURATION]}
    base = adapters.native_weights(weights)
    path = adapters.write_native(tmp_path / "song.safetensors", "dora-rows", shapes, norms=base)
    (tmp_path / "song.trigger.txt").write_text("tape hiss\n")
    result = run(sa3_lora.main, ["info", path, "--weights", weights, "--json"])
    document = json.loads(result.out)
    assert (document["kind"], document["ranks"], document["alpha"]) == ("dora-rows", [4], 6.0)
    assert document["trigger_words"] == ["tape hiss"] and document["layers"] == 2
    for layer in shapes:
        expected = np.linalg.norm(adapters.merged_weight(path, layer, base[layer], 1.0) - base[layer]) / np.linalg.norm(
            base[layer]
        )
        assert document["changes"][layer] == pytest.approx(expected, rel=1e-4)
    assert "tape hiss" in run(sa3_lora.main, ["info", path]).out
