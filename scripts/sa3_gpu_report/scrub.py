"""Removal of private data from logs: prompts, paths of home and work folders, tokens, user names."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path

TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|ghp_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,})|(?i:bearer)\s+\S+")
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
SECRET_TEXT = "<token>"  # what stands in its place
SHORTEST = 6  # letters of a secret or name that is looked for: shorter ones are ordinary words
HOME = re.compile(r"(?:/home|/Users|/root)(?:/[^\s/:'\"]+)?")


class Scrubber:
    """Scrubber of logs: replaces known folders by names, and private data by their kind."""

    def __init__(self, folders: dict[str, Path], prompts: Iterable[str] = ()) -> None:
        """Compile the patterns. `folders`: name -> folder, written as <name>; `prompts` are replaced verbatim."""
        known = [(str(path.resolve()), f"<{name}>") for name, path in folders.items()]
        known += [(str(path), f"<{name}>") for name, path in folders.items() if path.is_absolute()]
        known += [(str(Path.home()), "~")] if str(Path.home()) != "/" else []
        secrets = [value for name, value in os.environ.items() if SECRET_NAMES.search(name)]
        known += [(value, SECRET_TEXT) for value in secrets if len(value) >= SHORTEST]
        known += [(prompt, "<prompt>") for prompt in prompts if len(prompt) >= SHORTEST]
        names = (_user(), socket.gethostname())
        known += [(name, "<name>") for name in names if len(name) >= SHORTEST and name != "localhost"]
        self._known = sorted(
            known, key=lambda pair: len(pair[0]), reverse=True
        )  # a folder before the one that holds it

    def __call__(self, text: str) -> str:
        """Return the text without private data."""
        for private, shown in self._known:
            text = text.replace(private, shown)
        return HOME.sub("~", TOKEN.sub(SECRET_TEXT, text))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
