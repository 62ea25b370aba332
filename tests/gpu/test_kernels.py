"""The Triton kernels compared with plain PyTorch on this machine's GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from sa3_trt_core.torch_models.dit.reference_ops import PlainOps
from sa3_trt_core.torch_models.dit.triton_ops import FusedOps

ROWS, TOKENS, HEADS, INNER, MEMORY = 2, 101, 3, 160, 64
WIDTH = HEADS * 64
SCALE = 0.02


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


@pytest.fixture(scope="module")
def both() -> tuple[FusedOps, PlainOps]:
    rates = 1e4 ** -(torch.arange(0, 32, 2, device="cuda") / 32)
    half = torch.outer(torch.arange(256, device="cuda").float(), rates)
    angles = torch.cat([half, half], dim=-1)
    return FusedOps(angles.cos(), angles.sin()), PlainOps(angles.cos(), angles.sin())


def alike(actual: Tensor, expected: Tensor, limit: float) -> None:
    """Assert the same type and a relative norm of the difference below `least`: FP8 codes may differ by one step."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert actual.dtype == expected.dtype and difference < limit


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("local", [None, "frames", "constant"])
def test_residual_and_norm(both: tuple[FusedOps, PlainOps], scale: float | None, local: str | None) -> None:
    torch.manual_seed(0)
    hidden, branch = normal(ROWS, TOKENS, WIDTH).half(), normal(ROWS, TOKENS, WIDTH).half()
    shape = {"frames": (ROWS, TOKENS - MEMORY, WIDTH), "constant": (1, 1, WIDTH)}
    local_embedding = None if local is None else normal(*shape[local]).half()
    vectors = [normal(ROWS, WIDTH) for _ in range(4)]
    results = [
        ops.add_normed(hidden, branch, *vectors[:2], local_embedding, MEMORY, *vectors[2:], 1e-5, scale) for ops in both
    ]  # fmt: skip
    alike(results[0][0], results[1][0], 1e-3)
    alike(results[0][1], results[1][1], 0.01)


@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("bound", [14.0, 99.0])
def test_self_attention_with_a_fixed_subtrahend_and_with_the_running_maximum(
    both: tuple[FusedOps, PlainOps], scale: float | None, bound: float
) -> None:
    torch.manual_seed(0)
    stored, ratio = normal(ROWS, TOKENS, 5 * WIDTH).half(), normal(5 * WIDTH).abs() + 0.5
    q_gamma, k_gamma = 1 + 0.1 * normal(64), 1 + 0.1 * normal(64)
    results = [ops.self_attention(stored, ratio, q_gamma, k_gamma, 1e-6, bound, scale) for ops in both]
    alike(results[0], results[1], 0.01)


@pytest.mark.parametrize("scale", [None, SCALE])
def test_cross_attention(both: tuple[FusedOps, PlainOps], scale: float | None) -> None:
    torch.manual_seed(0)
    stored, keys = normal(ROWS, TOKENS, 2 * WIDTH).half(), normal(ROWS, 257, 3 * WIDTH).half()
    ratio, gamma = normal(2 * WIDTH).abs() + 0.5, normal(64)
    results = [ops.cross_attention(stored, ratio, keys, gamma, 1e-6, 99.0, scale) for ops in both]
    alike(results[0], results[1], 0.01)


@pytest.mark.parametrize("scale", [None, SCALE])
def test_gate(both: tuple[FusedOps, PlainOps], scale: float | None) -> None:
    torch.manual_seed(0)
    stored, ratio, bias = normal(ROWS, TOKENS, 2 * INNER).half(), normal(2 * INNER), normal(2 * INNER)
    results = [ops.gated(stored, ratio, bias, scale) for ops in both]
    alike(results[0], results[1], 0.001)
