"""Library of the producing and compiling commands in build/."""
