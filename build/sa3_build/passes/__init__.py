"""Graph passes: each says what it needs, does one thing, counts what it did, and checks what it leaves."""
