"""Select linear layers, measure activations, set scales and round weights for FP8."""
