"""Merge LoRA adapters into ONNX graphs: find the native layers, merge, quantise the merged weights again."""
