"""The Triton kernels of the SAME autoencoder compared with plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from sa3_bench.random_same import SMALL, packed_decoder, random_autoencoder
from sa3_trt_core.torch_models.same.model import Same
from sa3_trt_core.torch_models.same.reference_ops import ReferenceOps
from sa3_trt_core.torch_models.same.runner import DecoderRunner
from sa3_trt_core.torch_models.same.triton_ops import Tile, Tiles, TritonOps
from sa3_trt_core.torch_models.same.weights import Packed

GPU = torch.device("cuda")
FRAMES = 45


@pytest.fixture(scope="module", params=["fp16", "fp8"])
def packed(request: pytest.FixtureRequest) -> Packed:
    return packed_decoder(random_autoencoder(SMALL, GPU), request.param)


def latents() -> Tensor:
    return torch.randn(2, 256, FRAMES, generator=torch.Generator().manual_seed(1)).cuda()


def decibels(samples: Tensor, reference: Tensor) -> float:
    error = (samples.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))


@pytest.mark.parametrize("tile", [Tile(32, 64, 2), Tile(16, 64, 2), Tile(64, 128, 8), Tile(128, 128, 8)])
def test_a_decoder_of_kernels_gives_what_plain_operations_give(packed: Packed, tile: Tile) -> None:
    kernels = Same(packed, TritonOps(packed.rates, Tiles(attention=tile))).samples(latents())
    plain = Same(packed, ReferenceOps(packed.rates)).samples(latents())
    assert decibels(kernels, plain) > (55.0 if packed.sizes.precision == "fp16" else 40.0)


def test_pieces_change_nothing(packed: Packed) -> None:
    """A library product of another size may round differently on a GPU; plain operations on a CPU are bit-identical."""
    ops = TritonOps(packed.rates)
    pieces, whole = (Same(packed, ops, *size).samples(latents()) for size in ((200,), ()))
    assert decibels(pieces, whole) > (55.0 if packed.sizes.precision == "fp16" else 40.0)


def test_a_replayed_graph_gives_what_the_first_call_gave(packed: Packed) -> None:
    runner = DecoderRunner(packed, TritonOps(packed.rates), GPU)
    first, *replays = (runner.pcm(latents()) for _ in range(3))
    assert all(torch.equal(first, replayed) for replayed in replays) and not torch.equal(first, runner.pcm(-latents()))
