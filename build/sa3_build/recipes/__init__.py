"""Procedures from source files to a checked artefact: the FP16-mixed and the FP8 recipe."""
