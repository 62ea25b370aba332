"""The DiT in PyTorch: weights packed from an ONNX graph, one forward for CPU and GPU, kernels for NVIDIA GPUs."""
