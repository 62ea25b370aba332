"""Merged weights compared with the trainer's formulas in NumPy, for every kind, strength and order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import adapters
from sa3_trt_core.lora.lora_set import LoraOptions, LoraSet, LoraSpec
from sa3_trt_core.lora.svd_bases import SvdBases

STRENGTHS = (-1.0, 0.0, 0.3, 1.0, 2.0)


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    """Return base weights of some layers, with well separated singular values."""
    generator = np.random.default_rng(7)
    weights = {}
    for layer, (out, into) in adapters.LAYER_SHAPES.items():
        left, values, right = np.linalg.svd(generator.standard_normal((out, into)), full_matrices=False)
        weights[layer] = ((left * values * 0.97 ** np.arange(len(values))) @ right).astype(np.float32) / 20
    return weights


@pytest.fixture(scope="module")
def files(base: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: adapters.write_native(folder / f"{kind}.safetensors", kind, adapters.LAYER_SHAPES, seed=index, norms=base)
        for index, kind in enumerate(adapters.KINDS)
    }


def difference(loras: LoraSet, base: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Return the largest difference of any merged weight relative to the largest weight of its layer."""
    worst = 0.0
    for layer, weight in base.items():
        merged = loras.merged(layer, torch.from_numpy(weight), SvdBases()).numpy()
        worst = max(worst, float(np.abs(merged - expected[layer]).max() / np.abs(weight).max()))
    return worst


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_every_kind_at_every_strength_is_the_trainers_formula(
    kind: str, files: dict[str, Path], base: dict[str, np.ndarray]
) -> None:
    for strength in STRENGTHS:
        loras = LoraSet.read([LoraSpec(files[kind], strength)])
        loras.require_fits(adapters.LAYER_SHAPES, "the test")
        expected = {
            layer: adapters.merged_weight(files[kind], layer, weight, strength) for layer, weight in base.items()
        }
        # Two fp32 decompositions of one matrix differ in the last places.
        assert difference(loras, base, expected) < (4e-5 if kind.endswith("-xs") else 2e-6), strength
        moved = max(float(np.abs(expected[layer] - base[layer]).max()) for layer in base)
        assert (moved > 1e-3) == (strength != 0)


@pytest.mark.parametrize("kind", ("dora-rows", "dora-cols-xs", "bora"))
def test_a_faded_adapter_is_the_line_between_the_base_and_its_full_strength(
    kind: str, files: dict[str, Path], base: dict[str, np.ndarray]
) -> None:
    for strength in (-1.0, 1e-4, 0.4, 2.0):
        loras = LoraSet.read([LoraSpec(files[kind], strength)], LoraOptions(rule="fade"))
        full_strength = {
            layer: adapters.merged_weight(files[kind], layer, weight, 1.0) for layer, weight in base.items()
        }
        expected = {layer: base[layer] + strength * (full_strength[layer] - base[layer]) for layer in base}
        assert difference(loras, base, expected) < 4e-5
    native = LoraSet.read([LoraSpec(files[kind], 0.4)])
    assert difference(native, base, expected) > 1e-3


@pytest.mark.parametrize("pair", (("lora", "dora-rows"), ("bora-xs", "dora-cols"), ("dora-rows-xs", "lora-xs")))
def test_a_chain_starts_each_adapter_from_the_result_before_and_a_sum_from_the_base(
    pair: tuple[str, str], files: dict[str, Path], base: dict[str, np.ndarray]
) -> None:
    for order in (pair, pair[::-1]):
        specs = [LoraSpec(files[order[0]], 0.7), LoraSpec(files[order[1]], 1.3)]
        chained, summed = {}, {}
        for layer, weight in base.items():
            first = adapters.merged_weight(files[order[0]], layer, weight, 0.7)
            chained[layer] = adapters.merged_weight(files[order[1]], layer, first, 1.3, original=weight)
            full = [adapters.merged_weight(spec.path, layer, weight, 1.0) - weight for spec in specs]
            summed[layer] = weight + 0.7 * full[0] + 1.3 * full[1]
        assert difference(LoraSet.read(specs), base, chained) < 4e-5
        assert difference(LoraSet.read(specs, LoraOptions(stacking="summed")), base, summed) < 4e-5
        assert difference(LoraSet.read(specs), base, summed) > 1e-3


def test_a_layer_that_only_the_second_adapter_has_is_changed_too(
    tmp_path: Path, base: dict[str, np.ndarray], files: dict[str, Path]
) -> None:
    few = {adapters.QKV: adapters.LAYER_SHAPES[adapters.QKV]}
    first = adapters.write_native(tmp_path / "few.safetensors", "lora", few, seed=50, norms=base)
    specs = [LoraSpec(first), LoraSpec(files["dora-rows"])]
    expected = {}
    for layer, weight in base.items():
        expected[layer] = adapters.merged_weight(
            files["dora-rows"], layer, adapters.merged_weight(first, layer, weight, 1.0), 1.0
        )
    assert difference(LoraSet.read(specs), base, expected) < 1e-5


def test_the_duration_embedder_is_left_out_only_when_asked(files: dict[str, Path], base: dict[str, np.ndarray]) -> None:
    weight = torch.from_numpy(base[adapters.DURATION])
    kept = LoraSet.read([LoraSpec(files["lora"])], LoraOptions(duration=False))
    assert torch.equal(kept.merged(adapters.DURATION, weight), weight)
    assert adapters.DURATION not in kept.layers and any("duration" in note for note in kept.notes)
    usual = LoraSet.read([LoraSpec(files["lora"])])
    assert not torch.equal(usual.merged(adapters.DURATION, weight), weight)
    assert kept.digest != usual.digest


def test_the_digest_follows_files_strengths_and_order_alone(files: dict[str, Path], tmp_path: Path) -> None:
    def digest(*specs: tuple[str, float], **options: str) -> str:
        return LoraSet.read([LoraSpec(files[kind], s) for kind, s in specs], LoraOptions(**options)).digest  # type: ignore[arg-type]

    reference = digest(("lora", 1.0), ("bora", 0.5))
    assert reference == digest(("lora", 1.0), ("bora", 0.5))
    changed = {digest(("bora", 0.5), ("lora", 1.0)), digest(("lora", 1.0), ("bora", 0.6)), digest(("lora", 1.0)),
              digest(("lora", 1.0), ("bora", 0.5), rule="fade"),
              digest(("lora", 1.0), ("bora", 0.5), stacking="summed")}  # fmt: skip
    assert len(changed | {reference}) == 6
    assert digest(("lora", 1.0), rule="fade") == digest(("lora", 1.0))  # the rules are one where there is no magnitude
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(files["lora"].read_bytes())
    assert LoraSet.read([LoraSpec(copy)]).digest == digest(("lora", 1.0))


def test_bases_are_kept_by_the_weights_digest_and_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((40, 30)).astype(np.float32))
    source = SvdBases(tmp_path / "bases")
    first = source.bases("model.project", weight, 4)
    (kept,) = (tmp_path / "bases").iterdir()
    wide = [side.clone() for side in SvdBases(tmp_path / "bases").bases("model.project", weight, 8)]
    assert torch.equal(wide[0][:, :4], first[0]) and len(list((tmp_path / "bases").iterdir())) == 1
    kept.write_bytes(kept.read_bytes()[:100])
    again = source.bases("model.project", weight, 4)
    assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    source.bases("model.project", 2 * weight, 4)
    assert len(list((tmp_path / "bases").iterdir())) == 2


def test_bases_of_a_checkpoint_are_those_of_its_own_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    layer = "model.transformer.layers.0.ff.ff.2"
    weight = torch.from_numpy(adapters.native_weights(copy)[layer])
    of_file = SvdBases(None, copy).bases(layer, weight + 0.1, 4)
    assert torch.allclose(of_file[0], SvdBases().bases(layer, weight, 4)[0], atol=1e-6)
    assert (tmp_path / "model.safetensors.svd").is_dir()
