"""The sampler uses the native order of noise and update; engines run a batch row by row if they must."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings, strategies as st
from onnx import TensorProto, helper

from sa3_trt_core.audio import autoencoder
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import DeviceEngine, DiTVelocity
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling.ring import RingRow, ring
from sa3_trt_core.sampling.sampler import Trajectory, denoised, ping_pong, row_noise
from sa3_trt_core.sampling.schedule import sigmas
from sa3_trt_core.stage_timer import Meter

CHANNELS, FRAMES = 4, 6


def conditioning(batch: int, frames: int = FRAMES) -> Conditioning:
    return Conditioning(
        t5_hidden=torch.zeros(batch, 256, 768),
        t5_mask=torch.zeros(batch, 256),
        seconds_total=torch.full((batch,), 5.0),
        local_add_cond=torch.zeros(batch, 257, frames),
    )


class Towards:
    """The exact velocity of one clean latent: v = (x - clean) / sigma, so that x - sigma v = clean at every sigma."""

    def __init__(self, clean: torch.Tensor) -> None:
        self.clean = clean
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.seen.append((x, t))
        return (x - self.clean) / t[:, None, None]

    def close(self) -> None: ...


@given(st.integers(1, 12), st.integers(1, 3), st.floats(0.2, 1.0))
@settings(max_examples=25, deadline=None)
def test_an_exact_velocity_recovers_the_clean_latent(steps: int, batch: int, sigma_max: float) -> None:
    clean = torch.randn(batch, CHANNELS, FRAMES, generator=torch.Generator().manual_seed(1))
    engine = Towards(clean)
    levels = sigmas(steps, sigma_max)
    latents = ping_pong(engine, row_noise(range(batch), CHANNELS, FRAMES), levels, conditioning(batch))
    torch.testing.assert_close(latents, clean, atol=1e-5, rtol=0)
    assert [t.tolist() for _, t in engine.seen] == [[s] * batch for s in levels[:-1].tolist()]


def test_the_update_and_the_noise_order_are_the_models_own() -> None:
    class Wave:
        def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            return torch.sin(3 * x) + t[:, None, None]

        def close(self) -> None: ...

    steps, seed = 5, 1528
    levels = sigmas(steps)
    torch.manual_seed(seed)
    x = torch.randn(1, CHANNELS, FRAMES)
    for now, after in itertools.pairwise(levels):
        d = x - now * (torch.sin(3 * x) + now)
        x = (1 - after) * d + after * torch.randn(1, CHANNELS, FRAMES)
    left_over = torch.randn(1, CHANNELS, FRAMES)

    noise = row_noise([seed], CHANNELS, FRAMES)
    called: list[tuple[int, float]] = []
    latents = ping_pong(Wave(), noise, levels, conditioning(1), lambda step, sigma: called.append((step, sigma)))
    assert torch.equal(latents, x)
    assert torch.equal(next(noise), left_over)  # the last step's noise is drawn too
    assert called == list(enumerate(levels[:-1].tolist()))


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.data())
@settings(max_examples=25, deadline=None)
def test_a_rows_noise_does_not_depend_on_its_neighbours(seeds: list[int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(seeds) - 1))
    together, alone = row_noise(seeds, CHANNELS, FRAMES), row_noise([seeds[row]], CHANNELS, FRAMES)
    torch.manual_seed(0)  # the global generator plays no part
    for _ in range(3):
        assert torch.equal(next(together)[row], next(alone)[0])


def test_different_seeds_and_draws_differ() -> None:
    noise = row_noise([0, 1], CHANNELS, FRAMES)
    first, second = next(noise), next(noise)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_velocity_that_is_not_finite_names_its_sigma(bad: float) -> None:
    class Overflowing(Towards):
        def velocity(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            v = super().velocity(x, t, cond)
            if len(self.seen) == 3:
                v[0, 0, 0] = bad
            return v

    engine = Overflowing(torch.zeros(1, CHANNELS, FRAMES))
    with pytest.raises(ToolError, match=r"not finite at sigma 0\.9845 \(step 3\)"):
        ping_pong(engine, row_noise([0], CHANNELS, FRAMES), sigmas(8), conditioning(1))


@pytest.mark.parametrize("depth", [None, 1, 2])
def test_a_real_engine_that_overflows_names_the_sigma_too(tmp_path: Path, depth: int | None) -> None:
    """log(t - 0.99) is NaN from the third step on, in a batch and in a ring."""
    path = tiny_dit(tmp_path / "dit.onnx", "B")
    proto = onnx.load(path)
    proto.graph.initializer.append(helper.make_tensor("low", TensorProto.FLOAT, [], [0.99]))
    proto.graph.node[2].input[1] = "logged"
    proto.graph.node.insert(2, helper.make_node("Sub", ["t3", "low"], ["above"]))
    proto.graph.node.insert(3, helper.make_node("Log", ["above"], ["logged"]))
    onnx.save(proto, path)
    noise, conditioning = row_noise([0], 256, FRAMES), random_conditioning(1)
    with DiTVelocity(OnnxRuntimeEngine(path)) as engine, pytest.raises(ToolError, match=r"at sigma 0\.9845 \(step 3\)"):
        if depth is None:
            ping_pong(engine, noise, sigmas(8), conditioning)
        else:
            row = RingRow(Trajectory(noise, sigmas(8)), conditioning, None, Meter())
            list(ring(engine, iter([(0, row)]), depth))


def test_denoised() -> None:
    assert denoised(torch.tensor([3.0]), torch.tensor([2.0]), 0.5).item() == 2.0


def tiny_dit(path: Path, batch: int | str) -> Path:
    """Write a DiT that meets the contract: velocity = x * t + mean(text) + seconds + mask channel, row by row."""
    shapes = {
        "x": [batch, 256, "L"], "t": [batch], "t5_hidden": [batch, 256, 768], "t5_mask": [batch, 256],
        "seconds_total": [batch], "local_add_cond": [batch, 257, "L"],
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("velocity", TensorProto.FLOAT, [batch, 256, "L"])
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2])
    nodes = [
        helper.make_node("Unsqueeze", ["t", "axes"], ["t3"]),
        helper.make_node("Unsqueeze", ["seconds_total", "axes"], ["s3"]),
        helper.make_node("Mul", ["x", "t3"], ["xt"]),
        helper.make_node("ReduceMean", ["t5_hidden", "axes"], ["text"], keepdims=1),
        helper.make_node("ReduceMean", ["t5_mask"], ["mask"], keepdims=0),
        helper.make_node("ReduceMean", ["local_add_cond"], ["local"], keepdims=0),
        helper.make_node("Sum", ["xt", "text", "s3"], ["most"]),
        helper.make_node("Sum", ["most", "mask", "local"], ["velocity"]),
    ]
    graph = helper.make_graph(nodes, "dit", inputs, [output], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def random_conditioning(batch: int) -> Conditioning:
    generator = torch.Generator().manual_seed(3)
    return Conditioning(
        t5_hidden=torch.randn(batch, 256, 768, generator=generator),
        t5_mask=torch.ones(batch, 256),
        seconds_total=torch.arange(batch).float() + 1,
        local_add_cond=torch.zeros(batch, 257, FRAMES),
    )


@pytest.mark.parametrize("fixed", [1, "B"])
def test_a_graph_fixed_at_one_row_serves_a_batch(tmp_path: Path, fixed: int | str) -> None:
    cond = random_conditioning(3)
    x, t = torch.randn(3, 256, FRAMES), torch.tensor([0.1, 0.5, 0.9])
    with DiTVelocity(OnnxRuntimeEngine(tiny_dit(tmp_path / "dit.onnx", fixed))) as engine:
        velocity = engine.velocity(x, t, cond)
    text = cond.t5_hidden.mean(dim=(1, 2))
    expected = x * t[:, None, None] + (text + cond.seconds_total + 1)[:, None, None]
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=0)


def test_wrong_inputs_name_the_right_ones(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(tiny_dit(tmp_path / "dit.onnx", "B"))
    with pytest.raises(ToolError, match="takes x, t, t5_hidden"):
        engine.run({"latent": torch.zeros(1, 256, 32)})


def test_what_onnxruntime_cannot_load_is_two_lines(tmp_path: Path) -> None:
    path = tiny_dit(tmp_path / "dit.onnx", "B")
    proto = onnx.load(path)
    proto.graph.node[2].op_type, proto.graph.node[2].domain = "diff_attn_swa", "samel"
    proto.opset_import.add(domain="samel", version=1)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ToolError) as caught:
        OnnxRuntimeEngine(path)
    assert "diff_attn_swa" in caught.value.message and "build/lower_attention.py" in caught.value.hint
    proto.graph.node[2].op_type = "another"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ToolError) as caught:
        OnnxRuntimeEngine(path)
    assert "build/export_onnx.py" in caught.value.hint
    proto.graph.node[2].input[0] = "nothing"
    proto.graph.node[2].domain = ""
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ToolError, match="cannot load"):
        OnnxRuntimeEngine(path)


def test_a_graph_fixed_in_length_is_two_lines(tmp_path: Path) -> None:
    path = tiny_dit(tmp_path / "dit.onnx", "B")
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = FRAMES + 2
    onnx.save(proto, path)
    with DiTVelocity(OnnxRuntimeEngine(path)) as engine, pytest.raises(ToolError, match="ONNX Runtime failed"):
        engine.velocity(torch.zeros(1, 256, FRAMES), torch.ones(1), random_conditioning(1))


def test_a_graph_that_gives_no_velocity_is_two_lines() -> None:
    with pytest.raises(ToolError, match="gives pcm, not velocity"):
        DiTVelocity(Nothing()).velocity(torch.zeros(1, 256, FRAMES), torch.ones(1), random_conditioning(1))


class Decoder(DeviceEngine):
    """A decoder whose sample value is its frame's index, for either kind of output; records its inputs."""

    def __init__(self, flavour: str, input_names: tuple[str, ...] = ("latent",)) -> None:
        self.flavour, self.input_names, self.output_names = flavour, input_names, (flavour,)
        self.max_batch: int | None = None
        self.given: Mapping[str, torch.Tensor] = {}

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.given = inputs
        frames = inputs["latent"].shape[-1]
        ramp = torch.arange(frames).repeat_interleave(4096)
        if self.flavour == "pcm":
            return {"pcm": torch.stack([ramp, -ramp], dim=-1).int()[None]}
        return {"audio": torch.stack([ramp, -ramp]).float()[None] / 32767}


class Nothing(Decoder):
    """A graph that accepts any input and returns the output of another kind."""

    def __init__(self) -> None:
        super().__init__("pcm")

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pcm": torch.zeros(1, 4096, 2)}


@pytest.mark.parametrize("flavour", ["pcm", "audio"])
@pytest.mark.parametrize("frames", [3, 32, 40])
def test_decoding_either_flavour_and_any_length(flavour: str, frames: int) -> None:
    decoder = Decoder(flavour)
    samples = autoencoder.decode(decoder, torch.ones(1, 256, frames))
    assert samples.dtype == torch.float32
    assert samples.shape == (frames * 4096, 2)
    assert (samples[-1] * 32767).round().tolist() == [frames - 1, 1 - frames]
    given_latent = decoder.given["latent"]
    assert given_latent.shape[-1] == max(32, frames)
    assert given_latent.sum() == 256 * frames


def test_audio_beyond_full_scale_is_kept_and_the_limiter_is_fed() -> None:
    decoder = Decoder("audio", ("latent", "limiter_ceiling"))
    loud = Decoder.run
    decoder.run = lambda inputs: {"audio": 40000 * loud(decoder, inputs)["audio"]}  # type: ignore[method-assign]
    samples = autoencoder.decode(decoder, torch.ones(1, 256, 32))
    assert samples[-1].tolist() == pytest.approx([40000 * 31 / 32767, -40000 * 31 / 32767])
    assert decoder.given["limiter_ceiling"].item() == 1.0


def test_muting_and_cutting() -> None:
    seconds, frames = 5.0, 120
    samples = torch.ones(frames * 4096, 2, dtype=torch.int16)
    finished = autoencoder.finish(samples, seconds)
    assert finished.shape == (220_500, 2)
    assert bool((finished == 1).all())
    assert bool((samples == 1).all())  # the decoder's tensor is not modified
