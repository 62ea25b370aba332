"""Plan, capture and write calibration rows from the model's own generation."""
