"""Limits of number formats shared by graphs, packed weights and kernels, and conversion of numbers to JSON."""

from __future__ import annotations

import math
from typing import Any

E4M3_MAX = 448.0  # the largest finite value of float8_e4m3fn; it has no infinity, so larger ones must be clamped
FP16_MAX = 65504.0


def finite(value: Any) -> Any:
    """Replace non-finite numbers in a document of dicts and lists by None, as JSON cannot represent them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
