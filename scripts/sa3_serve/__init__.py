"""HTTP service over a live ring (continuous batching): the command `sa3_serve`. Needs the extra `serve`."""
