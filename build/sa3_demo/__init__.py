"""The demonstration model: its synthetic music, its training, and its scores."""
