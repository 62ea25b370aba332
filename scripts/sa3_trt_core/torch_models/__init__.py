"""PyTorch implementations of the packed networks."""
