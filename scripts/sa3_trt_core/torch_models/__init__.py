"""Packed networks that PyTorch runs."""
