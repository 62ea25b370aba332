"""Long-running fault injection: kills, full disks, damaged input. Short versions are in the suite."""
