"""Limits of the number formats that graphs, packed weights and kernels share."""

E4M3_MAX = 448.0  # the largest finite value of float8_e4m3fn; it has no infinity, so larger ones must be clamped
FP16_MAX = 65504.0
