"""The demonstration model: its made-up music, its training, and the measurements that judge it."""
