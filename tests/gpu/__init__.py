"""What only a GPU can show; skipped without one. Nothing in this folder has been run by its authors."""
