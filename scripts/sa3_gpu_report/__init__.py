"""One folder that says how this project fares on a machine: its parts, their logs, a page and a document."""
