"""Read, query, check and write ONNX graphs."""
