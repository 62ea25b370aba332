"""Locate files in the hub's cache, or download them."""
