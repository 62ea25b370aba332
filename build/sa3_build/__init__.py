"""The producer and compile library behind the commands in build/."""
