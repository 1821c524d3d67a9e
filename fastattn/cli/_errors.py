"""Errors as one line on stderr with an exit code that a script can use: 2 for what the user can put right, 1 for the rest."""

from __future__ import annotations

import os
import sys
import traceback

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
PIPE_CLOSED = 141  # what a shell reports for a program ended by SIGPIPE

# Raised for what a user named or wrote: an unknown model, a broken file, a value out of range. UnicodeError is a ValueError
# but never the user's doing here: the loaders and prompts turn theirs into their own.
_USER_ERRORS = (ValueError, TypeError, OSError)


class CLIError(ValueError):
    """A mistake in how a command was called, already worded for the user."""


def debug() -> bool:
    from fastattn import config

    try:
        return config.log_level() == "DEBUG"
    except ValueError:  # the variable itself is wrong; that is reported elsewhere
        return False


def one_line(error: BaseException) -> str:
    """The message without line breaks; a KeyError's or an empty one gets its type in front."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__}: {text}".rstrip(": ")


def report(error: BaseException) -> int:
    """Says on stderr what went wrong and gives the exit code. FASTATTN_LOGLEVEL=DEBUG adds the traceback."""
    if debug():
        traceback.print_exception(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "fastattn._runtime":
        line, code = "the C++ runtime is not built: pip install . (fastattn doctor says what else is missing)", 2
    elif isinstance(error, ImportError):
        line, code = f"{one_line(error)} (fastattn doctor says what is missing)", 2
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        line, code = f"out of memory: {one_line(error)} (fastattn plan MODEL says what it takes)", 1
    elif isinstance(error, _USER_ERRORS) or type(error).__name__ == "EngineBusyError":
        line, code = one_line(error), 2
    elif type(error).__name__ == "RankError":
        line, code = one_line(error), 1
    else:
        line = f"internal error: {type(error).__name__}: {one_line(error)} (FASTATTN_LOGLEVEL=DEBUG shows where)"
        code = 1
    print(f"fastattn: {line}", file=sys.stderr)
    return code


def hush_stdout() -> None:
    """After the reader of our output went away: Python's own flush at exit must not complain about it again."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):  # stdout is no file, as in tests
        pass
