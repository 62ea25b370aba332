"""Load a native checkpoint and export its graphs to ONNX."""
