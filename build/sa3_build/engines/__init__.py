"""Build engines from ONNX graphs; inspect, check and publish them."""
