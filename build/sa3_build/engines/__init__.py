"""Compile ONNX graphs to engines, and what follows: inspection, state, publishing."""
