"""Is one DiT as good as another? Single steps, whole generations, their sound, gates, a report and a page to listen."""
