"""Tests that need a GPU; skipped without one.

The kernels' tests have run on an H100; those of TensorRT have not been run by their authors.
"""
