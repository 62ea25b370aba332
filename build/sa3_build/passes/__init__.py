"""Graph passes: each checks its preconditions, makes one rewrite, counts the changes, and checks its postconditions."""
