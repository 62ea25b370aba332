"""Faults in large: scripts that kill, starve and confuse the commands. Small versions are in the suite."""
