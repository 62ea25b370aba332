"""Artefacts on disk: atomic writes, manifests, locks, sidecars, calibration sets and check rows."""
