"""Code shared by the packed networks: linear layers in 16 bits or FP8, the packed file format, kernel functions."""
