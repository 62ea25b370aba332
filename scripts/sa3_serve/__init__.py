"""The service: HTTP requests into a ring that runs, sounds out. Needs the extra `serve`; the command `sa3_serve`."""
