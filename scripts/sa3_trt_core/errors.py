"""What a user's mistake looks like: two lines on stderr and an exit code, never a traceback."""

from __future__ import annotations

USAGE_EXIT = 2
GATE_EXIT = 3


class ToolError(Exception):
    """A mistake that the user can mend: `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, message: str, hint: str, exit_code: int = USAGE_EXIT) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Exceptions travel between processes by their arguments; ours are not the base class's one message."""
        return type(self), (self.message, self.hint, self.exit_code)

    def lines(self) -> str:
        """The two lines, each free of newlines so that they stay two whatever a library put into the message."""
        return f"error: {_one_line(self.message)}\n  hint: {_one_line(self.hint)}"


class GateError(ToolError):
    """A check of the result said no: exit code 3, and `report`, where there is one, after the two lines."""

    def __init__(self, message: str, hint: str, report: str | None = None) -> None:
        super().__init__(message, hint, GATE_EXIT)
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.hint, self.report)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
