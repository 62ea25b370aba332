"""Rows that a ring passes one by one, on a GPU: the velocity of the batch, and new rows replace old ones."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU", allow_module_level=True)

from sa3_bench import random_dit
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.torch_models.dit.model import Dit
from sa3_trt_core.torch_models.dit.runner import CONDITIONING, Runner
from sa3_trt_core.torch_models.dit.triton_ops import ByLength, FusedOps

DEVICE = torch.device("cuda")
ROWS, FRAMES = 3, 40


def row(seed: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(256) < 9 + seed).float()[None]
    hidden = torch.randn((1, 256, 768), generator=generator) * mask[..., None]
    return Conditioning(hidden, mask, torch.tensor([2.0 + seed]), torch.zeros(1, 257, FRAMES)).on("cuda")


def test_rows_given_one_by_one_have_the_batchs_velocity() -> None:
    packed = random_dit.packed_of(random_dit.random_module(random_dit.MEDIUM, DEVICE).float(), "fp16mixed")
    runner = Runner(Dit(packed, FusedOps(packed.tensor("cosine"), packed.tensor("sine"), ByLength())), DEVICE)
    x = torch.randn((ROWS, 256, FRAMES), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    t = torch.tensor([1.0, 0.7, 0.3])
    with torch.inference_mode():
        for rows in ([row(0), row(1), row(2)], [row(3), row(4), row(5)]):
            for _ in range(2):  # the second time from the graphs
                one_by_one = runner.rows_velocity(x, t, rows).clone()
            joined = Conditioning.joined(rows)
            batch = runner.velocity(x, t, {name: getattr(joined, name) for name in CONDITIONING}).clone()
            assert float((one_by_one - batch).norm() / batch.norm()) < 1e-2
        others = runner.rows_velocity(x, t, [row(6), *rows[1:]])
        assert float((others[0] - batch[0]).norm() / batch[0].norm()) > 1e-2
        assert torch.equal(others[1:], one_by_one[1:])
