"""Benchmark our engines and their peers on the same random weights, in one run."""
