"""`python -m sa3_serve`."""

from sa3_serve.command import entry

if __name__ == "__main__":
    entry()
