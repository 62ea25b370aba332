"""The runtime library of Stable Audio 3 on NVIDIA GPUs: tables, files, engines, sampler."""

__version__ = "0.1.0"
