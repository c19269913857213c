"""How a command ends on bad input, a full disk, a closed terminal: one line and an exit code."""

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

BAD_INPUT = 2
"""The exit code of it."""

on_failure: list[Callable[[int, str], None]] = []
"""Called with the exit code and the line where a command fails, once the line is written."""
last_line = threading.Lock()
"""Held by the thread that writes the command's last line and ends it."""


class UserError(Exception):
    """Bad input. The message is the one line that names the field, the value and the fix."""


def require(holds: bool, field: str, value: object, fix: str) -> None:
    """Raises UserError where it does not hold."""
    if not holds:
        raise UserError(f"{field}={value!r}: {fix}")


def require_installed(package: str, field: str, value: object) -> None:
    """Raises UserError where a package, which only this value needs, is not installed."""
    is_there = importlib.util.find_spec(package) is not None
    require(is_there, field, value, f"needs {package}; pip install -e '.[test]'")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """A whole command: bad input ends it with one line on standard error and exit code 2.

    Only a command silences the libraries for good: what fails is raised, and what their callbacks
    and background tasks report is the same news again.
    """
    sys.stdout, sys.stderr = (stream or _nowhere() for stream in (sys.stdout, sys.stderr))
    sys.unraisablehook = lambda _: None
    for source in ("absl", "asyncio"):
        logging.getLogger(source).setLevel(logging.CRITICAL)
    code = BAD_INPUT
    try:
        with _signals_raise():
            yield
            sys.stdout.flush()
        return
    except UserError as error:
        line = f"error: {error}"
    except Stopped as stopped:
        line, code = f"{stopped}: stopped; what was saved is kept", 128 + stopped.number
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    except BrokenPipeError:  # whoever read our output has enough (`| head`)
        line, code = "", 141
        give_up(sys.stdout)
    except OSError as error:
        if not _fails(sys.stdout):
            raise
        give_up(sys.stdout)  # a full disk behind `>`
        line = f"error: standard output: {error.strerror or error}; make room"
    _end(code, " ".join(line.split()))


def _end(code: int, line: str) -> NoReturn:
    """The last line, and the exit code. The other processes of a run learn of it undisturbed."""
    with last_line:
        if on_failure:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        if line:
            write_line(line)
        for end in on_failure:
            end(code, line)
    raise SystemExit(code)


class Stopped(BaseException):
    """A signal asked the command to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does; one that is ignored stays so (`nohup`)."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_line(line: str, to: TextIO | None = None) -> None:
    """A line, on standard error unless given, if there is somebody to read it."""
    stream = to or sys.stderr
    try:
        print(line, file=stream, flush=True)
    except OSError:
        give_up(stream)


def _fails(stream: TextIO) -> bool:
    """Whether nothing can be written there; where it can, a line is ended."""
    try:
        os.write(stream.fileno(), b"\n")
    except OSError:
        return True
    return False


def _nowhere() -> TextIO:
    """Where a command writes that was started without a standard output (`>&-`)."""
    return open(os.devnull, "w", encoding="utf-8")


def give_up(stream: TextIO) -> None:
    """What is written from here on is for nobody: the pipe is closed, or the terminal is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def disk_errors(field: str, value: object, fix: str) -> Iterator[None]:
    """A full disk, a missing folder, a forbidden file as a `UserError` of this field."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{field}={value!r}: {error.strerror or error}; {fix}") from None


class ArgumentParser(argparse.ArgumentParser):
    """Options of a command beside a run's config; bad ones raise `UserError`."""

    def __init__(self, **fields: Any):
        super().__init__(**fields, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument (--\w+): expected one argument", message)
        dash = f"a value that begins with a dash is written {named[1]}=-x; " if named else ""
        raise UserError(f"{message}; {dash}--help lists the options")


def require_at_least_1(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        require(getattr(options, name) >= 1, name, getattr(options, name), "must be at least 1")
