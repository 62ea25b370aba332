"""GPTQ: round weights to E4M3 so that the rounding errors of an output channel compensate each other.

Rounding each weight of y = x W to the nearest code is independent of x. Its error in y is x (W_q - W), and half of the
squared error of the FP8 trunk comes from it (build/NOTES.md). A smaller scale does not help: E4M3 is a floating point
format, so the relative step is the same at every scale. GPTQ (Frantar et al. 2022) minimises |X W_q - X W|^2 over
calibration activations X (tokens, K) instead:
    1. H = X^T X (K, K) contains the correlations of the inputs.
    2. Inputs k are rounded one after another, those with most energy first.
    3. The error of input k is subtracted from the inputs still to come, weighted by the inverse of H.
The scale of each output channel stays amax / 448; only the choice of the codes changes. It costs
nothing at inference. `damping` adds a share of the mean diagonal to H, which keeps the codes from overfitting the
calibration rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sa3_build.e4m3 import E4M3
from sa3_trt_core.number_formats import E4M3_MAX

if TYPE_CHECKING:
    import torch

BLOCK = 128  # inputs (rows of K) whose errors are propagated together; affects speed only


def rounded(weight: np.ndarray, scale: np.ndarray, axis: int, hessian: torch.Tensor, damping: float) -> np.ndarray:
    """Return the E4M3 codes of a weight, in its own layout.

    `weight` has its N output channels along `axis` and K inputs along the other; `scale` is (N,); `hessian` (K, K) is
    X^T X of the activations, fp32. Inputs are rounded in falling order of energy; the error of each is compensated by
    the inputs still to come (Frantar et al. 2022, equations 2 and 3; algorithm 1). `damping` is added to the diagonal,
    as a share of its mean.
    """
    import torch

    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    feedback = _feedback(hessian[order][:, order], damping)
    scaled = weight.astype(np.float32) / scale.astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
    remaining = torch.from_numpy(scaled if axis == 1 else np.ascontiguousarray(scaled.T))[order]  # (K, N)
    codes = torch.empty_like(remaining)
    for begin in range(0, len(remaining), BLOCK):
        end = min(begin + BLOCK, len(remaining))
        errors = torch.empty(end - begin, remaining.shape[1])
        for k in range(begin, end):
            codes[k] = remaining[k].clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)
            errors[k - begin] = (remaining[k] - codes[k]) / feedback[k, k]
            remaining[k + 1 : end] -= torch.outer(feedback[k, k + 1 : end], errors[k - begin])
        remaining[end:] -= feedback[begin:end, end:].T @ errors
    unsorted = torch.empty_like(codes)
    unsorted[order] = codes
    result: np.ndarray = unsorted.numpy().astype(E4M3)
    return result if axis == 1 else np.ascontiguousarray(result.T)


def deviation(weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, axis: int) -> float:
    """Return the largest relative L2 error of an output channel; rounding to nearest gives about 0.03."""
    shape = (-1, 1) if axis == 0 else (1, -1)
    source = weight.astype(np.float32)
    error = codes.astype(np.float32) * scale.astype(np.float32).reshape(shape) - source
    norm = np.maximum(np.linalg.norm(source, axis=1 - axis), np.finfo(np.float32).tiny)
    return float((np.linalg.norm(error, axis=1 - axis) / norm).max())


def _feedback(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse.

    Computed in fp64, because the Hessian is nearly singular.
    """
    import torch

    damped = hessian.to(torch.float64)
    mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)
