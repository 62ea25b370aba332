"""What several test files share: running commands, tiny models and their damage."""
