"""LoRA adapters in ONNX graphs: finding the native layers, merging, and quantising the merged weights again."""
