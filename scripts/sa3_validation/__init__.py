"""Comparison of a DiT with a reference: single steps, generations, sound, gates, a report and a page to listen."""
