"""Report of this project on a machine, in one folder: parts, their logs, a page and a document."""
