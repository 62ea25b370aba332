"""The unconditional row of guidance and the empty negative prompt are different, in every precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import cosine_similarity as cosine

from sa3_trt_core import Generator, Request
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.sampling.guidance import negative_conditioning, null_conditioning, positive_conditioning
from sa3_trt_core.sampling.inputs import conditioning, guidance_of

MIN_COSINE = {"fp32": 0.9999, "fp16mixed": 0.9999, "fp8": 0.97}  # of final latents, against fp32


def is_null(hidden: torch.Tensor, mask: torch.Tensor) -> list[bool]:
    """Return, for each row, the condition of the graphs for the unconditional row: hidden and mask are all zero."""
    return ((hidden.abs().amax(dim=(1, 2)) == 0) & (mask.amax(dim=1) <= 0)).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.booleans())
def test_no_text_is_the_null_row_and_the_null_row_always_is(tokens: int, silent: bool) -> None:
    """Without a BOS an empty text has a mask of zeros, and its features may be zero."""
    mask = (torch.arange(256) < tokens).float()[None]
    hidden = torch.zeros(1, 256, 768) if silent else torch.randn(1, 256, 768)
    cond = Conditioning(*positive_conditioning(hidden, mask), torch.tensor([5.0]), torch.zeros(1, 257, 4))
    assert is_null(cond.t5_hidden, cond.t5_mask) == [False] and torch.equal(cond.t5_mask, mask)
    read = mask[..., None] > 0.5  # elsewhere the features are the padding embedding
    assert torch.equal(cond.t5_hidden * read, hidden * read)
    negative = negative_conditioning(cond, hidden, mask)
    assert is_null(negative.t5_hidden, negative.t5_mask) == [False]
    assert torch.equal(negative.t5_hidden, hidden * mask[..., None])
    null = null_conditioning(cond)
    assert is_null(null.t5_hidden, null.t5_mask) == [True] and torch.equal(null.seconds_total, cond.seconds_total)


def test_rows_of_a_batch_each_have_their_own() -> None:
    features = {text: (torch.full((1, 256, 768), 0.5), (torch.arange(256) < n).float()[None])
                for n, text in enumerate(("", "a", "b"))}  # fmt: skip
    rows = [Request("a", 5.0, cfg=2.0), Request("a", 5.0, cfg=2.0, negative_prompt=""),
            Request("", 5.0, cfg=2.0, negative_prompt="b")]  # fmt: skip
    cond, _, _ = conditioning(rows, features, [None] * 3)
    guidance = guidance_of(rows, cond, features)
    assert guidance is not None
    null = guidance.null
    assert is_null(null.t5_hidden, null.t5_mask) == [True, False, False]
    assert [int(row.any(-1).sum()) for row in null.t5_hidden] == [0, 0, 2]


def test_both_are_right_in_every_precision(tiny_fp8: Path) -> None:
    """Latents are near fp32's; the effect of the empty text agrees in fp16 (FP8 is too noisy to compare it)."""
    base = Request("slow piano, 70 BPM", 1.0, steps=2, cfg=6.0, apg=0.0)
    latents_by_precision = {}
    for precision in MIN_COSINE:
        with Generator.load(precision=precision, backend="onnxruntime", onnx_root=tiny_fp8) as generator:
            latents_by_precision[precision] = [
                generator.generate(replace(base, negative_prompt=negative)).latents.flatten() for negative in (None, "")
            ]
    for precision, least in MIN_COSINE.items():
        for latents, expected in zip(latents_by_precision[precision], latents_by_precision["fp32"], strict=True):
            assert float(cosine(latents, expected, dim=0)) > least, precision
        without_negative, with_empty = latents_by_precision[precision]
        assert float((with_empty - without_negative).norm() / without_negative.norm()) > 1e-3
    effects = [
        latents_by_precision[precision][1] - latents_by_precision[precision][0] for precision in ("fp16mixed", "fp32")
    ]
    assert float(cosine(*effects, dim=0)) > 0.99
