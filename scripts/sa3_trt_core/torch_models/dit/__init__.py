"""The DiT in PyTorch: weights packed from an ONNX graph, one forward for any machine, kernels for NVIDIA GPUs."""
