"""The Triton kernels of the text encoder compared with plain PyTorch, on a GPU or with TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from sa3_bench.random_same import random_text_encoder
from sa3_trt_core.torch_models.t5gemma.model import Encoder
from sa3_trt_core.torch_models.t5gemma.reference_ops import ReferenceOps
from sa3_trt_core.torch_models.t5gemma.triton_ops import TritonOps
from sa3_trt_core.torch_models.t5gemma.weights import Packed, Sizes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ROWS, TOKENS, WIDTH = 2, 40, 96
SMALL = Sizes(
    width=WIDTH, depth=1, heads=6, key_heads=2, head_channels=24, inner=80, tokens=TOKENS, vocabulary=100, epsilon=1e-6,
    embedding_scale=9.5, score_scale=1 / 40, score_cap=50.0,
)  # fmt: skip
HALVES_LIMIT = 3e-5 if INTERPRETED else 4e-6  # the interpreter cuts bf16 off, where a GPU rounds
KERNELS_A_LAYER = 14  # four products, each of one or two kernels, and six or fewer between them
whole_model = pytest.mark.skipif(INTERPRETED, reason="the products of bf16 in fp32 need a GPU")


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


@pytest.fixture(scope="module")
def both() -> tuple[TritonOps, ReferenceOps]:
    angles = torch.outer(torch.arange(TOKENS).float(), 1e4 ** -(torch.arange(12).float() / 12)).repeat(1, 2)
    packed = Packed(SMALL, {"cosine": angles.cos().to(DEVICE), "sine": angles.sin().to(DEVICE)}, torch.empty(0))
    return TritonOps(packed), ReferenceOps(packed)


def result(channels: int, split: bool) -> Tensor:
    """A product's result as the kernels read it: the second half is 2^-9 of the first."""
    value = normal(ROWS * TOKENS, channels)
    return torch.stack([value, value.flip(0) * 2.0**-9]) if split else value[None]


def apart(value: Tensor, expected: Tensor) -> float:
    """The relative L2 distance of two product inputs; halves are added first."""
    assert value.shape == expected.shape and value.dtype == expected.dtype
    whole, reference = value.double().sum(0), expected.double().sum(0)
    return float((whole - reference).norm() / reference.norm())


@pytest.mark.parametrize("split", [True, False])
def test_the_embeddings_enter_scaled_and_normed(both: tuple[TritonOps, ReferenceOps], split: bool) -> None:
    embedded, weight = normal(ROWS * TOKENS, WIDTH), 1 + normal(WIDTH)
    (hidden, normed), (expected, expected_normed) = (ops.enter(embedded, weight, split) for ops in both)
    assert torch.equal(hidden, expected) and apart(normed, expected_normed) < (HALVES_LIMIT if split else 1e-6)


@pytest.mark.parametrize("split", [True, False])
def test_a_branch_is_normed_and_added_and_the_sum_normed(both: tuple[TritonOps, ReferenceOps], split: bool) -> None:
    weights, sums, outputs = (1 + normal(WIDTH), 1 + normal(1, WIDTH)[0]), [], []
    for ops in both:
        sums.append(10 * normal(ROWS * TOKENS, WIDTH))
        outputs.append(ops.add_norm(sums[-1], result(WIDTH, split), *weights, split))
    assert apart(sums[0][None], sums[1][None]) < 1e-6 and apart(*outputs) < (HALVES_LIMIT if split else 1e-6)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("used", [(1, 33), (TOKENS, 7), (0, TOKENS)])
def test_attention_ignores_masked_keys(
    both: tuple[TritonOps, ReferenceOps], used: tuple[int, int], split: bool
) -> None:
    """Three query heads share a key head, and blocks of keys end inside the tokens; no key at all weighs all alike."""
    mask = (torch.arange(TOKENS) < torch.tensor(used)[:, None]).float().to(DEVICE)
    stored = 3 * result((6 + 2 * 2) * 24, split)
    assert apart(*(ops.attention(stored, mask, split) for ops in both)) < (3e-5 if split else 2e-5)


def test_a_score_near_0_is_exact(both: tuple[TritonOps, ReferenceOps]) -> None:
    """Scores of about 1 are 50 tanh(0.02): a tanh with an absolute error of 1e-7 changes weights by 5e-6."""
    stored, mask = 0.4 * result(10 * 24, False), torch.ones(ROWS, TOKENS, device=DEVICE)
    assert apart(*(ops.attention(stored, mask, False) for ops in both)) < 1.5e-6


@pytest.mark.parametrize("split", [True, False])
def test_the_gate_is_gelu(both: tuple[TritonOps, ReferenceOps], split: bool) -> None:
    stored = 3 * result(2 * 80, split)
    assert apart(*(ops.gate(stored, split) for ops in both)) < (HALVES_LIMIT if split else 1e-6)


def text(rows: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 100, (rows, 256), generator=torch.Generator().manual_seed(rows))
    return ids, (torch.arange(256) < torch.tensor([40, 256, 3])[:rows, None]).long()


def in_fp32(packed: Packed, names: str = "") -> Packed:
    """The same encoder with the weights whose name contains `names` in fp32."""
    embedding = packed.tensors["embedding"]
    tensors = {name: value for name, value in packed.tensors.items() if name != "embedding"}
    return Packed(
        packed.sizes, {name: value.float() if names in name else value for name, value in tensors.items()}, embedding
    )


@whole_model
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("wide", ["nothing", "down", ""])
def test_features_are_those_of_fp32(rows: int, wide: str) -> None:
    """With bf16 weights, with those of one product in fp32, and with all in fp32; rows keep their own masks."""
    packed, (ids, mask) = random_text_encoder(12, DEVICE, 100), text(rows)
    plain, mixed = in_fp32(packed), in_fp32(packed, wide)
    with torch.inference_mode():
        expected = Encoder(plain, ReferenceOps(plain), DEVICE).hidden_states(ids, mask).clone()
        encoder = Encoder(mixed, TritonOps(mixed), DEVICE)
        features = encoder.hidden_states(ids, mask).clone()
        replayed = encoder.hidden_states(ids, mask)
    assert torch.equal(features, replayed)
    assert float((features - expected).norm() / expected.norm()) < 1e-5


@whole_model
def test_a_graph_has_few_kernels() -> None:
    packed, (ids, mask) = random_text_encoder(12, DEVICE, 100), text(1)
    encoder = Encoder(packed, TritonOps(packed), DEVICE)
    with torch.inference_mode():
        encoder.hidden_states(ids, mask)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            encoder.hidden_states(ids, mask)
            torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    count = sum("memcpy" not in name.lower() for name in on_device)
    assert 12 * 8 < count < 12 * KERNELS_A_LAYER + 10
