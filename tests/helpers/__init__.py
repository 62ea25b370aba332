"""Test helpers used by several files: run commands, build tiny models, damage files."""
