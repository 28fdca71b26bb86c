"""The one place where values become text of a shell or a comment."""

import shlex
import sys

import epplan


def shell(*words: str) -> str:
    """Return words of a command line as a POSIX shell reads them back."""
    return shlex.join(words)


def comment(text: str) -> str:
    """Return text for one comment line: what would end the line or hide in it is escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def command_line() -> str:
    """Return the command that runs, as a shell reads it."""
    return shell("epplan", *sys.argv[1:])


def made_by() -> str:
    """Return version and command, for the head of the files the command writes."""
    return f"epplan {epplan.__version__}: {command_line()}"
