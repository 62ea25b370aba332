"""Files that are written whole or not at all: manifests, locks, sidecars, calibration sets."""
