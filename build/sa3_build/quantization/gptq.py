"""Round weights to E4M3 so that the errors of an output channel cancel over K, on real activations (GPTQ).

Half of the squared error of the FP8 trunk is the rounding of its weights, and scales cannot lessen it: E4M3 is a
floating point format (build/NOTES.md). Which of the two neighbours a weight takes can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sa3_build.e4m3 import E4M3
from sa3_trt_core.number_formats import E4M3_MAX

if TYPE_CHECKING:
    import torch

BLOCK = 128  # inputs whose errors are handed on together; changes speed only


def rounded(weight: np.ndarray, scale: np.ndarray, axis: int, gram: torch.Tensor, damping: float) -> np.ndarray:
    """E4M3 codes of a weight, in its own layout.

    `weight` has its N output channels along `axis` and K inputs along the other; `scale` is (N,); `gram` (K, K) is
    X^T X of the activations, fp32. Inputs are rounded in falling order of their energy; the error of each is made
    good, as far as `gram` says it can be, by those that are still to come (Frantar et al. 2022, equations 2 and 3; its
    algorithm 1). `damping` is added to the diagonal, as a share of its mean: it is what keeps the codes from fitting
    the calibration rows alone.
    """
    import torch

    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    feedback = _feedback(gram[order][:, order], damping)
    wide = weight.astype(np.float32) / scale.astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
    left = torch.from_numpy(wide if axis == 1 else np.ascontiguousarray(wide.T))[order]  # (K, N)
    codes = torch.empty_like(left)
    for begin in range(0, len(left), BLOCK):
        end = min(begin + BLOCK, len(left))
        errors = torch.empty(end - begin, left.shape[1])
        for k in range(begin, end):
            codes[k] = left[k].clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
            errors[k - begin] = (left[k] - codes[k]) / feedback[k, k]
            left[k + 1 : end] -= torch.outer(feedback[k, k + 1 : end], errors[k - begin])
        left[end:] -= feedback[begin:end, end:].T @ errors
    back = torch.empty_like(codes)
    back[order] = codes
    found: np.ndarray = back.numpy().astype(E4M3)
    return found if axis == 1 else np.ascontiguousarray(found.T)


def deviation(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, axis: int) -> float:
    """The furthest that a channel is from its source: relative L2; rounding to the nearest leaves about 0.03."""
    shape = (-1, 1) if axis == 0 else (1, -1)
    source = weight.astype(np.float32)
    off = codes.astype(np.float32) * scale.astype(np.float32).reshape(shape) - source
    size = np.maximum(np.linalg.norm(source, axis=1 - axis), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(off, axis=1 - axis) / size).max())


def _feedback(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, by way of fp64: it is nearly singular."""
    import torch

    damped = gram.to(torch.float64)
    mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
