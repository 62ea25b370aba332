"""The packed T5Gemma text encoder."""
