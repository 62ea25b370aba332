"""The T5Gemma text encoder, packed."""
