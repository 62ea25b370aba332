"""Find files in the hub cache or download them."""
