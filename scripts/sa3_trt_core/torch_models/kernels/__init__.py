"""What the packed networks share: products in 16 bits or FP8, the packed file, parts of kernels."""
