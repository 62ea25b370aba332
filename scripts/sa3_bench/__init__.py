"""The benchmark of the DiT step: our engine and its peers on the same random weights, in one run."""
