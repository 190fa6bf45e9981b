"""The text and the files that a command writes. A standard output or error that fails does not end the work."""

from __future__ import annotations

import argparse
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from . import signals
from .limits import fault, of_path

_lost: list[OSError] = []  # the errors of standard output


def open_streams() -> None:
    """Have descriptors 0 to 2 open, and both streams take any text.

    The next file that is opened gets the number of a closed one, and would be written to as if it were the terminal.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(_open_nowhere(), True)  # the lowest free number, which is fd
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    _lost.clear()
    logging.raiseExceptions = False  # a line of the log that can't be written is lost


def say(text: str) -> None:
    """Print *text* on standard error. It is lost if that is closed (to print, None is standard output), full or gone."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print *text* on standard output. If it can't be, the work goes on, and `flush` says so."""
    with _kept_back():
        print(text, flush=True)


@contextmanager
def _kept_back() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        _lost.append(e)


def human(args: argparse.Namespace) -> Callable[[str], None]:
    """Return the function that prints a report for people: on standard output, unless --json - keeps that for JSON."""
    return say if args.json == "-" else tell


def flush() -> None:
    """Have everything that was printed go out; OutputError if it can't, BrokenPipeError if its reader is gone."""
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except OSError:
            _to_nowhere(2)
    if sys.stdout is not None:
        with _kept_back():
            sys.stdout.flush()
    if _lost:
        error = _lost[0]
        _lost.clear()
        _to_nowhere(1)
        if isinstance(error, BrokenPipeError):  # its reader, such as `head`, has enough of it
            raise error
        raise OutputError(f"cannot write to standard output: {fault(error)}") from error


def _to_nowhere(fd: int) -> None:
    """Open /dev/null in the place of *fd*: the interpreter flushes the stream's buffer once more at its end."""
    nowhere = _open_nowhere()
    os.dup2(nowhere, fd)
    os.close(nowhere)


def _open_nowhere() -> int:
    """Open /dev/null, or, where there is none, an empty file in memory."""
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:
        return os.memfd_create("nowhere")


@contextmanager
def whole_file(path: str) -> Iterator[None]:
    """Write the file *path* in this block; OutputError, and no part of it is left, if that fails or is broken off."""

    def remove() -> None:
        with suppress(OSError):
            if stat.S_ISREG(Path(path).stat().st_mode):
                Path(path).unlink()

    signals.at_end(remove)
    try:
        yield
    except BaseException as e:
        remove()
        if isinstance(e, OSError):
            raise OutputError(f"cannot write {path}: {of_path(path, e, to_make=True)}") from e
        raise
    finally:
        signals.no_more_at_end(remove)


def write_json(path: str, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if path != "-":
        with whole_file(path):
            Path(path).write_text(text)
    else:
        with _kept_back():
            sys.stdout.write(text)


def json_writer(args: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Return the function that writes a report as --json asks for it."""
    return lambda report: write_json(args.json, report) if args.json else None


def is_same_file(path: Path, other: Path) -> bool:
    """True if *path* and *other* are one file; /dev/null counts as many."""
    if not path.exists():
        return path.resolve() == other.resolve()
    return path.is_file() and other.exists() and path.samefile(other)
